"""Steps on disk, as far as their metadata: found, opened, verified.

`checkpoint` says what their folders hold.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_jax.contents import FORMAT_VERSION, MODEL_ITEMS
from lowrank_jax.errors import DamagedCheckpoint, MissingFile, UserError, at
from lowrank_jax.metadata import METADATA_FILE, check_metadata
from lowrank_jax.pieces import check_seal, verify_pieces


class Saved(NamedTuple):
    """A checkpoint on disk, read as far as its metadata.

    Args:
      path: Folder of the step.
      metadata: What it says about itself.
      prefix: What the paths of its arrays begin with there; of a part, see `part_of`.
    """

    path: Path
    metadata: dict[str, Any]
    prefix: str = ""

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @property
    def max_ranks(self) -> dict[str, Any]:
        return self.metadata["max_ranks"]


def open_checkpoint(path: str | Path) -> Saved:
    """Finds a checkpoint and reads its metadata.

    Args:
      path: A step's folder, a folder of steps, or a workdir with a folder
        `checkpoints`; of several steps the latest that is complete.

    Raises:
      MissingFile: There is no (complete) checkpoint.
      UserError: The folder or its metadata is of another kind or another format.
    """
    complete = complete_steps(path)
    if not complete:
        inside = sorted(_root(path).iterdir())
        whole = [p for p in inside if p.is_dir() and "tmp" not in p.name]
        found = [p for p in whole if complete_steps(p)]
        fix = "A save that was cut off leaves a temporary or half-written folder; use"
        fix = f"{fix} another one." if not found else f"Did you mean {found[0]}?"
        raise MissingFile(
            f"must hold a complete checkpoint of this library, got {path}, which has"
            f" {[p.name for p in inside]}. {fix}"
        )
    try:
        metadata = json.loads((complete[0] / METADATA_FILE).read_bytes())
        version = metadata.get("format_version")
        if version == FORMAT_VERSION or "sha256" in metadata:
            check_seal(metadata)
    except DamagedCheckpoint as error:
        raise damaged_step(complete[0], f"metadata: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        text = f"metadata: must be JSON of this library, not another's, got {error}."
        raise damaged_step(complete[0], text) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"must be of format {FORMAT_VERSION}, got {version} in {complete[0]}. Use"
            f" the library version {metadata.get('library_version')} that wrote it."
        )
    with at(f"checkpoint {complete[0]}"):
        check_metadata(metadata)
    return Saved(complete[0], metadata)


def complete_steps(path: str | Path) -> list[Path]:
    """Finds the checkpoints that were written to their end, the latest first.

    Whether their files are still as they were written, only reading them shows: go on
    with the next one after a `DamagedCheckpoint`.

    Args:
      path: A step's folder, a folder of steps, or a workdir with a folder
        `checkpoints`.

    Raises:
      MissingFile: There is no such folder.
    """
    root = _root(path)
    steps = [p for p in root.iterdir() if p.name.isdigit()]
    candidates = sorted(steps, key=lambda p: -int(p.name)) or [root]
    marks = (METADATA_FILE, "_CHECKPOINT_METADATA")
    return [p for p in candidates if all((p / mark).is_file() for mark in marks)]


def set_aside(step: Path) -> Path:
    """Renames a damaged step's folder, so that the step can be saved again.

    Returns:
      The new path, `STEP.damaged` or, if that is there, `STEP.damaged.1` and so on.
    """
    names = (f".{n}" * bool(n) for n in itertools.count())
    paths = (step.with_name(f"{step.name}.damaged{name}") for name in names)
    return step.rename(next(path for path in paths if not path.exists()))


def verify(saved: Saved) -> None:
    """Reads a whole checkpoint.

    Raises:
      DamagedCheckpoint: A file is not as it was written.
    """
    try:
        for name, leaves in saved.metadata["arrays"].items():
            if any(math.prod(shape) for shape, _ in leaves.values()):
                verify_pieces(saved.path / name)
    except DamagedCheckpoint as error:
        raise damaged_step(saved.path, str(error)) from error


def damaged_step(step: Path, text: str) -> DamagedCheckpoint:
    """The error for a step, with the checkpoint to use in its place."""
    older = [
        path
        for path in (complete_steps(step.parent) if step.name.isdigit() else [])
        if path.name.isdigit() and int(path.name) < int(step.name)
    ]
    use = f"Use the one before it, {older[0]}." if older else "Use another checkpoint."
    return DamagedCheckpoint(f"checkpoint {step}: {text} {use}")


def part_of(saved: Saved, layer: str, places: Sequence[str]) -> Saved:
    """Returns a checkpoint as one of a layer's factors alone, whose path is empty.

    Args:
      saved: The checkpoint.
      layer: The path of the layer.
      places: Paths of the factors in the model; those of shared ones are stored once.
    """
    about = saved.metadata
    prefixes = [f"{place}/" if place else "" for place in places]
    stored = about["arrays"]["params"]
    prefix = next(
        (one for one in prefixes if any(key.startswith(one) for key in stored)),
        prefixes[0],
    )

    def inside(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key.removeprefix(prefix): leaf
            for key, leaf in leaves.items()
            if key.startswith(prefix)
        }

    arrays = {
        name: inside(leaves)
        for name, leaves in about["arrays"].items()
        if name in MODEL_ITEMS
    }
    part = {"arrays": arrays, "rank_axes": inside(about["rank_axes"])}
    part |= {key: {"": about[key][layer]} for key in ("ranks", "max_ranks")}
    return Saved(saved.path, {**about, **part}, prefix)


def _root(path: str | Path) -> Path:
    """The folder of steps, or of one step."""
    root = Path(path).absolute()
    if not os.path.isdir(root):  # of a name that is too long as well
        raise MissingFile(
            f"must be a folder with a checkpoint, got {path}, which is not"
            " there. Check the path."
        )
    return root / "checkpoints" if (root / "checkpoints").is_dir() else root
