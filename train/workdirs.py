"""A run's folder: whose it is, what it holds, which checkpoint to go on from."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_jax import checkpoint, errors
from lowrank_jax.errors import UserError
from train import distributed, folders
from train.config import differences
from train.report import logs

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def own(workdir: Path, resources: contextlib.ExitStack) -> None:
    """Owns a workdir until the resources are given back; of several processes, the
    first does.

    Raises:
      UserError: Another run has it, or it cannot be written.
    """

    def lock() -> None:
        if distributed.is_first():
            with errors.at("--workdir"):
                folders.check_writable(workdir)
                resources.enter_context(folders.lock(workdir))
            folders.put_back(workdir / CHECKPOINTS)

    distributed.together(lock)


def steps_of(workdir: Path, config: Mapping[str, Any]) -> list[Path]:
    """Returns the checkpoints of this config's run, the latest first.

    A save that was cut off is named. All processes must see the same folder.

    Raises:
      UserError: The folder holds something else.
    """
    steps = distributed.together(lambda: _steps_of(workdir, config))
    distributed.check_same({"checkpoints": [path.name for path in steps]})
    return steps


def _steps_of(workdir: Path, config: Mapping[str, Any]) -> list[Path]:
    file, folder = workdir / CONFIG, workdir / CHECKPOINTS
    if not file.exists():
        if not all(folders.is_leftover(path) for path in workdir.glob("*")):
            raise UserError(
                f"--workdir: must be a new folder or one of a run, got {workdir}, which"
                " holds other files. Nothing is overwritten; name another."
            )
        return []
    begun = any(path.name.isdigit() for path in folder.glob("*"))
    try:
        with errors.at("--workdir"):
            lines = differences(file, config)
    except UserError:
        if begun:
            raise
        return []  # cut off by a kill, when there was nothing to lose yet
    if lines:
        raise UserError(
            f"--workdir: must hold a run of the same config, got {workdir} with\n  "
            + "\n  ".join(lines)
            + "\nName a new workdir; config.init_from starts from a checkpoint."
        )
    for path in sorted(folder.glob("*.orbax-checkpoint-tmp*")):
        logs.say(f"{path}: a save that was cut off; it is removed")
    with errors.at("--workdir"):
        return checkpoint.complete_steps(folder) if begun else []


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder, which then says what config it is of."""
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1, sort_keys=True)
        folders.write_atomically(workdir / CONFIG, text)
