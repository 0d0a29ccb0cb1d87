"""Moments inside a run at which the campaign raises a signal.

This is the campaign's own: nothing of it is in `train/`. A child of the campaign's
server counts the moments of each place as it comes to them, and raises the signal at
the one that it is told. What it counted, it leaves in a file when it ends by itself.
"""

import atexit
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUNCTIONS = {
    "start": ("train.loop:start_run",),
    "step": ("train.session:Session.train_step",),
    "log": ("train.report.logs:MetricWriter.write",),
    "save": ("lowrank_jax.checkpoint:CheckpointWriter.save",),
    "evaluation": ("train.evaluation:Evaluator.at",),
    "shrink": ("lowrank_jax.shrinking:shrink",),
    "phase end": (
        "train.ending:end_phase",
        "lowrank_jax.surgery:canonicalize",
        "lowrank_jax.surgery:truncate",
        "lowrank_jax.selection.search:beam_search",
    ),
}
"""Functions of each place; a moment is just before and just after each call."""
FILES = "files"
"""The place whose moments are the operations on the files of checkpoints."""
WRITING = "writing"
"""The place whose moments are milliseconds after a save has returned, while it is
written in the background."""
PLACES = (*FUNCTIONS, FILES, WRITING)
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
_MOST_MILLISECONDS = 150


class Moments:
    """Counts the moments of a process, and raises a signal at one of them.

    Args:
      report: File for the counts and for where the signal was raised.
      place: Where to raise it, a name of `PLACES`; "" for nowhere.
      number: At which moment of the place, from 1; for `WRITING`, the save, and behind
        the point how many thousandths of a second after it.
      signal_name: Which.
    """

    def __init__(self, report: Path, place: str, number: float, signal_name: str):
        self._report, self._place = report, place
        self._number, self._signal = number, signal_name
        self._counts: Counter[str] = Counter()
        self._pid = os.getpid()

    def install(self, folder: Path) -> None:
        """Begins to count.

        Args:
          folder: Of the checkpoints, for `FILES`.
        """
        for place, functions in FUNCTIONS.items():
            for name in functions:
                self._wrap(place, name)
        prefix = str(folder)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in _FILE_EVENTS and str(args[0]).startswith(prefix):
                self._reach(FILES)

        sys.addaudithook(hook)
        atexit.register(self._write)

    def _wrap(self, place: str, name: str) -> None:
        module, _, path = name.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function: Callable[..., Any] = getattr(owner, last)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._reach(place)
            result = function(*args, **kwargs)
            self._reach(place)
            if place == "save":
                self._reach_while_writing()
            return result

        setattr(owner, last, counted)

    def _reach(self, place: str) -> None:
        self._counts[place] += 1
        if place == self._place and self._counts[place] == self._number:
            self._strike(f"{place} {self._number}")

    def _reach_while_writing(self) -> None:
        self._counts[WRITING] += 1
        save = int(self._number)
        if self._place == WRITING and self._counts[WRITING] == save:
            seconds = (self._number - save) * _MOST_MILLISECONDS / 1000
            where = f"{1000 * seconds:.0f} ms after save {save}"
            timer = threading.Timer(seconds, self._strike, [where])
            timer.daemon = True
            timer.start()

    def _strike(self, where: str) -> None:
        self._place = ""
        self._write(where)
        os.kill(self._pid, getattr(signal, self._signal))
        if self._signal == "SIGKILL":
            time.sleep(60)  # not one instruction more

    def _write(self, struck: str = "") -> None:
        if struck or not self._report.exists():
            text = json.dumps({"struck": struck, "counts": self._counts})
            self._report.write_text(text)
