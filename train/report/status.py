"""What a run is doing, in one small file that can be read at any time: `status.json`.

Who reads it needs nothing else of the run, and nothing but Python. That its process is
gone, the file cannot say: the lock of the folder does (`train.folders.owner`).
"""

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from lowrank_jax.errors import UserError
from lowrank_jax.version import __version__
from train import folders
from train.stopping import Interrupted

STATUS = "status.json"
"""Name of the file in a run's folder."""
ENDED = ("finished", "stopped", "failed")
"""The states of a run whose process is gone as it should be."""
STATES = ("starting", "compiling", "training", "evaluating", "saving", "changing")
"""The states of a run that goes on; with those of `ENDED`, all there are."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    "state": str,  # of `STATES` or `ENDED`
    "phase": str,  # its name
    "headline": str,  # the name of the figure that the run is judged by
    "step": int,  # steps that are done
    "last_step": int,  # should no phase end early
    "rate": (int, float),  # steps a second
    "seconds_left": (int, float),
    "ranks": dict,  # active, by layer
    "figures": dict,  # of the last evaluation, by fraction of the ranks
    "message": str,  # what the progress line said last, or why the run ended
    "pid": int,
    "host": str,
    "processes": int,
    "devices": int,
    "time": str,  # of writing, UTC, ISO 8601
    "library_version": str,
}
"""What the file holds; a value that is not known yet is null or missing."""
_SECONDS_BETWEEN_WRITES = 1.0


class StatusFile:
    """Writes what a run is doing; says how it ended when its context ends.

    The file is a service: where the disk refuses it, the run goes on, and ends over
    what it needs.

    Args:
      workdir: Folder of the run, which is there.
      enabled: Whether to write at all; of several processes, one does.
    """

    def __init__(self, workdir: str | os.PathLike, *, enabled: bool = True):
        self._path, self._enabled = Path(workdir) / STATUS, enabled
        self._written = -_SECONDS_BETWEEN_WRITES
        self._values: dict[str, Any] = {
            "state": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "library_version": __version__,
        }

    def write(self, **values: Any) -> None:
        """Notes values and writes all of them: at once where the state is another one,
        else at most once a second.

        Args:
          **values: Of `FIELDS`.
        """
        if not self._enabled:
            return
        changed = values.get("state", self._values["state"]) != self._values["state"]
        self._values |= values
        now = time.monotonic()
        if not changed and now - self._written < _SECONDS_BETWEEN_WRITES:
            return
        self._written = now
        written = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = {**self._values, "time": written}
        text = json.dumps(values, indent=1, default=_plain)
        with contextlib.suppress(OSError):
            folders.write_atomically(self._path, text, durable=False)

    def __enter__(self) -> "StatusFile":
        self.write(state="starting")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        left = {"rate": None, "seconds_left": None}
        if error is None:
            self.write(state="finished", message="", **left)
            return
        state = "stopped" if isinstance(error, Interrupted) else "failed"
        text = str(error) or type(error).__name__
        self.write(state=state, message=text.splitlines()[0], **left)


def _plain(value: Any) -> Any:
    """What JSON does not hold, such as a figure that is an array, as what it does."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns what a run wrote last; None where there is no file.

    Raises:
      UserError: The file is not one of `StatusFile`.
    """
    path = Path(workdir) / STATUS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    problem = _problem_of(values)
    if problem:
        raise _damaged(path, problem)
    return values


def _problem_of(values: Any) -> str:
    """What is wrong with the values of a file; "" for nothing."""
    if not isinstance(values, dict) or values.get("state") not in STATES + ENDED:
        return "it names no state of a run"
    for name, kind in FIELDS.items():
        value = values.get(name)
        if value is not None and not isinstance(value, kind):
            return f"{name} is {value!r}"
    try:
        datetime.datetime.fromisoformat(values["time"])
    except (KeyError, TypeError, ValueError):
        return "it does not say when it was written"
    return ""


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        f"{path}: must be JSON that a run wrote, got other text ({reason}). The run"
        " writes it anew when it goes on."
    )
