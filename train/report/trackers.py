"""Where metrics go: JSON lines, TensorBoard, Weights & Biases, or one's own tracker.

All of them write in the training thread: a full disk ends the run where it is met,
which a thread of a tracker's own would hide, or wait for without end.
"""

import importlib
import importlib.util
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from lowrank_jax.errors import UserError
from train import folders

METRICS = "metrics.jsonl"
"""Name of the lines in a run's folder."""
WANDB_ID = "wandb_id"
"""Name of the file that holds what Weights & Biases calls the run."""
_SECONDS_BETWEEN_FLUSHES = 5.0


class Tracker(Protocol):
    """Takes metrics; on process 0 alone."""

    def write(self, step: int, flat: Mapping[str, Any]) -> None:
        """Takes the metrics of a step: JSON values by `"/"`-joined name."""

    def close(self) -> None:
        """Ends; what was taken is kept."""


OpenTracker = Callable[[Path, Mapping[str, Any], int], Tracker]
"""From a workdir, the run's config and the step it starts after to a tracker."""


class Lines:
    """Writes one line of JSON for each step into workdir/metrics.jsonl.

    A run that resumes drops what an earlier attempt wrote after `start_step`, so that
    every line is there once. What that attempt wrote of `start_step` itself once the
    checkpoint was saved, such as an evaluation, comes again and is left out.

    Args:
      workdir: Folder of the run.
      start_step: The step the run starts after; 0 for a new run.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / METRICS
        self._start_step, self._there = start_step, list[set[str]]()
        if self._path.exists():
            kept = _drop_lines_after(self._path, start_step)
            self._there = [{*line} for line in kept if line["step"] == start_step]
        # unbuffered: what a full disk refused is not tried again when it is closed
        self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, flat: Mapping[str, Any]) -> None:
        """Appends a line."""
        if step == self._start_step and {"step", *flat} in self._there:
            return
        left = (json.dumps({"step": step, **flat}) + "\n").encode()
        with folders.naming(self._path):
            while left:  # a disk may take a part, and refuse the rest when asked again
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps, and broken ones; returns the others."""
    kept, texts = [], []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(line)
                texts.append(text + "\n")
        except (ValueError, TypeError, KeyError):
            continue  # cut short when the earlier attempt was killed
    folders.write_atomically(path, "".join(texts))
    return kept


class TensorBoard:
    """Writes what is a number as scalars into workdir/tensorboard.

    TensorBoard drops what an earlier attempt wrote after `start_step`.

    Args:
      workdir: Folder of the run.
      start_step: As of `Lines`.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._folder = workdir / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        self._flushed = time.monotonic()
        # the name has the second alone: two attempts may be of the same one
        suffix = f".{time.time_ns()}"
        with folders.naming(self._folder):
            self._events = event_file_writer.EventsWriter(
                str(self._folder / "events"), suffix
            )
            began = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(start_step + 1, session_log=began)

    def write(self, step: int, flat: Mapping[str, Any]) -> None:
        """Adds a scalar for each number."""
        with folders.naming(self._folder):
            for name, value in flat.items():
                if isinstance(value, int | float):
                    self._write(step, summary=summary.scalar(name, value))
            if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
                self._events.flush()
                self._flushed = time.monotonic()

    def _write(self, step: int, **content: Any) -> None:
        event = event_pb2.Event(step=step, wall_time=time.time(), **content)
        self._events.write_event(event)

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        with folders.naming(self._folder):
            self._events.close()


class Wandb:
    """Writes to Weights & Biases; a run that resumes goes on with its run there.

    Args:
      project: Its name there.
      workdir: Folder of the run, which keeps the run's id.
      config: The run's config, shown beside it.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        file = workdir / WANDB_ID
        if not file.exists():
            folders.write_atomically(file, secrets.token_hex(4))
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            id=file.read_text().strip(),
            resume="allow",
            config=dict(config),
            dir=str(workdir),
        )

    def write(self, step: int, flat: Mapping[str, Any]) -> None:
        """Logs the metrics of a step, which are left out there if it has later ones."""
        self._run.log(dict(flat), step=step)

    def close(self) -> None:
        """Finishes the run there."""
        self._run.finish()


def wandb(project: str) -> OpenTracker:
    """Returns what opens Weights & Biases for a run.

    Raises:
      UserError: It is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb: must have the package wandb installed, got {project!r} without"
            " it. Run pip install wandb, or drop the flag."
        )
    return lambda workdir, config, start_step: Wandb(project, workdir, config)
