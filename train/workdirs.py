"""A run's folder: whose it is, what it holds, which checkpoint to go on from."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax import checkpoint, errors
from lowrank_jax.errors import UserError
from train import distributed, folders
from train.config import differences
from train.report import logs

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SECONDS_OF_DISK = 15.0
"""How long a disk over the network may take to show a file that another host wrote."""


def own(workdir: Path, resources: contextlib.ExitStack) -> None:
    """Owns a workdir until the resources are given back; of several processes, the
    first does, and the others must see its lock.

    Raises:
      UserError: Another run has it, it cannot be written, or it is another folder here
        than in process 0.
    """

    def lock() -> None:
        if distributed.is_first():
            with errors.at("--workdir"):
                folders.check_writable(workdir)
                resources.enter_context(folders.lock(workdir))

    distributed.together(lock)
    file = workdir / folders.LOCK
    said = distributed.exchange(file.read_text() if distributed.is_first() else "")[0]
    distributed.together(lambda: _check_shared(file, said))


def _check_shared(file: Path, said: str) -> None:
    """A disk over the network may show a new file some seconds late."""
    deadline = time.monotonic() + SECONDS_OF_DISK
    while not file.is_file() or file.read_text() != said:
        if time.monotonic() > deadline:
            raise UserError(
                "--workdir: must be one folder that all processes see, got"
                f" {file.parent.absolute()}, where process 0's lock is not. Give an"
                " absolute path on a shared disk."
            )
        time.sleep(0.1)


def steps_of(workdir: Path, config: Mapping[str, Any]) -> list[Path]:
    """Returns the checkpoints of this config's run, the latest first.

    What was not written to its end is named and set aside.

    Raises:
      UserError: The folder holds something else.
    """
    distributed.together(lambda: _check_config(workdir, config))
    folder = workdir / CHECKPOINTS
    if distributed.is_first() and folder.is_dir():
        _tidy(folder)
    distributed.exchange(None)  # all see it tidy
    steps = checkpoint.complete_steps(folder) if folder.is_dir() else []
    steps = [path for path in steps if path.name.isdigit()]
    distributed.check_same({"checkpoints": [path.name for path in steps]})
    return steps


def _check_config(workdir: Path, config: Mapping[str, Any]) -> None:
    file, folder = workdir / CONFIG, workdir / CHECKPOINTS
    if not file.exists():
        if not all(folders.is_leftover(path) for path in workdir.glob("*")):
            raise UserError(
                f"--workdir: must be a new folder or one of a run, got {workdir}, which"
                " holds other files. Nothing is overwritten; name another."
            )
        return
    begun = any(path.name.isdigit() for path in folder.glob("*"))
    try:
        with errors.at("--workdir"):
            lines = differences(file, config)
    except UserError:
        if begun:
            raise
        return  # cut off by a kill, when there was nothing to lose yet
    if lines:
        raise UserError(
            f"--workdir: must hold a run of the same config, got {workdir} with\n  "
            + "\n  ".join(lines)
            + "\nName a new workdir; config.init_from starts from a checkpoint."
        )


def _tidy(folder: Path) -> None:
    """Names what is not whole, and makes room for it to be saved again."""
    folders.put_back(folder)
    for path in sorted(folder.glob("*.orbax-checkpoint-tmp*")):
        logs.say(f"{path}: a save that was cut off; it is removed")
    complete = {*checkpoint.complete_steps(folder)}
    for path in sorted(folder.absolute().iterdir()):
        if path.name.isdigit() and path not in complete:
            aside = checkpoint.set_aside(path)
            logs.say(f"skipped: {path} was not written to its end; it is now {aside}")


def set_aside(damaged: Sequence[Path]) -> None:
    """Makes room for steps that are damaged, before anyone saves them again."""
    if distributed.is_first():
        for path in damaged:
            logs.say(f"{path} is now {checkpoint.set_aside(path)}")
    distributed.exchange(None)


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder, which then says what config it is of."""
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1, sort_keys=True)
        folders.write_atomically(workdir / CONFIG, text)
