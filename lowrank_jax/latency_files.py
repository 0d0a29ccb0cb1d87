"""Files of layers' times: JSON that is parsed number by number, and written whole."""

import json
import math
import os
from pathlib import Path
from typing import Any, TypeAlias

from lowrank_jax.errors import UserError

Entry: TypeAlias = dict[str, dict[str, float]]
Table: TypeAlias = dict[str, Entry]
"""By layer, form ("dense" too) and rank, as text: ns."""

DENSE = "dense"


def read_table(path: Path) -> tuple[str, Table]:
    """Reads what a table is of, and the table.

    Raises:
      UserError: It is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        layers = {
            str(key): {
                str(form): {
                    str(int(rank)): _positive(value) for rank, value in times.items()
                }
                for form, times in entry.items()
            }
            for key, entry in found["layers"].items()
        }
        for entry in layers.values():
            _ = entry[DENSE]["0"]
        return str(found["device"]), layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"must be a file that this library has written, got another ({error})."
            " Name a new one."
        ) from error


def write_table(path: Path, device: str, layers: Table) -> None:
    """Writes a table beside the file, and renames it; what another process has written
    there of other layers stays.

    Raises:
      OSError: It could not be written; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        theirs, others = read_table(path)
        layers = {**others, **layers} if theirs == device else layers
    text = json.dumps({"device": device, "layers": layers}, indent=1, sort_keys=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"a time is {value!r}")
    return float(value)
