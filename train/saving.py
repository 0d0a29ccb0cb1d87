"""When a run saves, and what: its model, its state, what it remembers."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax import checkpoint, errors
from train import distributed, folders
from train.run import Run
from train.session import Session


class Saver:
    """Saves a run into its folder.

    `saved_step` is the step of the last checkpoint, None without one.

    Args:
      run: What is saved.
      workdir: Its folder.
      saved: The checkpoint that it goes on from, if there is one.
    """

    def __init__(self, run: Run, workdir: Path, saved: checkpoint.Saved | None):
        self._run, self._workdir = run, workdir
        self.saved_step = saved.step if saved else None
        self._judged_and_due = saved and _judged_and_due(
            saved.step, saved.metadata["done"]
        )
        self._began = time.monotonic()
        self._open()

    def _open(self) -> None:
        self._folder = self._workdir / "checkpoints"
        self._writer = checkpoint.CheckpointWriter(
            self._folder,
            keep=self._run.config["keep_checkpoints"],
            keep_best=self._run.config["keep_best"],
            higher_is_better=self._run.task.higher_is_better,
        )

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is due at a step.

        The clock is that of the first process, and is asked when metrics are logged.
        """
        config, epoch = self._run.config, self._run.steps_per_epoch
        every_epochs = config["checkpoint_every_epochs"]
        every_steps = config["checkpoint_every_steps"]
        seconds = 60 * config["checkpoint_every_minutes"]
        if every_epochs and step and not step % (every_epochs * epoch):
            return True
        if every_steps and step and not step % every_steps:
            return True
        if not seconds or step % config["log_every_steps"]:
            return False
        late = time.monotonic() - self._began > seconds
        return distributed.exchange(late)[0]

    def save(
        self, step: int, session: Session, frontier: Sequence[Mapping[str, Any]]
    ) -> None:
        """Saves the run as it is; returns before all of it is on disk.

        How good it is, for what is kept, is the headline figure of the first row.

        What a stop broke off at this step and was done anew since replaces what was
        saved then; that goes when the new one is on disk.
        """
        again, now = step == self.saved_step, _judged_and_due(step, session.done)
        if again and self._judged_and_due == now:
            return
        with errors.at("--workdir"):
            folders.check_space(self._workdir, session.num_bytes())
        remembered = {"run": session.memory, "done": session.done}
        metadata = {**self._run.metadata(), **remembered}
        figure = frontier[0][self._run.task.headline] if frontier else None
        with folders.naming(self._folder):
            former = self._make_way(step) if again else None
            model, items = session.model(), session.state.items()
            self._writer.save(step, model, metadata, items, figure=figure)
            if former is not None:
                self._writer.wait()
                if distributed.is_first():
                    shutil.rmtree(former)
        self.saved_step, self._began = step, time.monotonic()
        self._judged_and_due = now

    def _make_way(self, step: int) -> Path:
        """Makes room for another checkpoint of a step."""
        self._writer.close()
        folder = self._folder / str(step)
        former = folders.make_way(folder) if distributed.is_first() else folder
        distributed.exchange(None)  # all see it gone
        self._open()
        return former

    def close(self) -> None:
        """Returns when everything is on disk."""
        with folders.naming(self._folder):
            self._writer.close()


def _judged_and_due(step: int, done: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a step was evaluated, and whether changes are still to be made at it."""
    return done["evaluated"] == step, done["changes_due"]
