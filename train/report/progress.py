"""What a run is doing, as a bar or as lines on stderr, and in its status file."""

import sys
import time
from pathlib import Path
from typing import Any

import tqdm

from train import distributed
from train.report.logs import duration, say
from train.report.pace import Pace
from train.report.status import StatusFile

_SECONDS_TO_FIRST_LINE = 1.0
_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A bar when stderr is a terminal, else a line soon and then every few seconds.

    A context manager: its end says in the file how the run ended. The rate is of what
    has the present shapes, and of nothing but training: it stands still while the run
    does something else, and begins anew when something was compiled.

    Args:
      workdir: Folder of the run, for its status file.
      total: The last step; may be set anew.
      start: Steps already done.
    """

    def __init__(self, workdir: Path, total: int, *, start: int = 0):
        self.total, self.pace = total, Pace()
        self._status = StatusFile(workdir, enabled=distributed.is_first())
        self._counted_from: tuple[int, float] | None = (0, 0.0)
        self._compiling = 0.0
        self._spoke, self._first = time.monotonic(), True
        self._evaluated = False
        self._bar = None
        if distributed.is_first() and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def __enter__(self) -> "Progress":
        self._status.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:  # later output starts on a line of its own
            self._bar.close()
        self._status.__exit__(*error)

    def doing(self, state: str, step: int, **about: Any) -> None:
        """Says what the run does that is no training; all steps before are done.

        Args:
          state: Of `train.report.status.STATES`.
          step: Steps that are done.
          **about: What else the status file shall say.
        """
        self.pace.stop(step)
        self._status.write(state=state, step=step, last_step=self.total, **about)
        if self._bar is not None:
            self._bar.set_postfix_str(state)
        elif state == "evaluating" and not self._evaluated:
            self._evaluated = True
            say(f"step {step}/{self.total}, compiling the evaluation ...")

    def note(self, **values: Any) -> None:
        """Notes values in the status file."""
        self._status.write(**values)

    def compiling(self, step: int, what: str, **about: Any) -> None:
        """Says, before the step after `step` runs, what is compiled first.

        Args:
          step: Steps that are done.
          what: What is compiled.
          **about: What else the status file shall say.
        """
        self.doing("compiling", step, **about)
        if self._bar is None:
            say(f"step {step}/{self.total}, compiling {what} ...")
        self._compiling = time.monotonic()

    def compiled(self) -> None:
        """Says how long that took; the rate begins anew."""
        now = time.monotonic()
        say(f"compiled in {now - self._compiling:.1f} s")
        self._counted_from, self._evaluated = None, False
        self._spoke, self._first = now, True

    def training(self, step: int) -> None:
        """Goes on with training, from a step on; nothing if it was that already."""
        if not self.pace.runs:
            self._status.write(state="training")
            self.pace.go(step)
            if self._counted_from is None:
                self._counted_from = self.pace.measure(step)
            if self._bar is not None:
                self._bar.set_postfix_str("")

    def due(self) -> bool:
        """Returns whether it is time for `update`, for which steps are waited for."""
        wait = _SECONDS_TO_FIRST_LINE if self._first else _SECONDS_BETWEEN_LINES
        return self.pace.runs and time.monotonic() - self._spoke >= wait

    def update(self, step: int, message: str = "", *, at_once: bool = False) -> None:
        """Shows that `step` steps are done, with `message` beside it.

        Args:
          step: Steps that are done, and were waited for.
          message: What is shown beside it.
          at_once: Write a line even if the last one is a moment ago.
        """
        rate, left = self._rate_and_left(step)
        state = {"state": "training"} if self.pace.runs else {}
        pace = {"rate": rate, "seconds_left": left}
        self._status.write(
            step=step, last_step=self.total, message=message, **state, **pace
        )
        parts = []
        if rate is not None:
            parts.append(
                f"{rate:,.0f} steps/s" if rate >= 100 else f"{rate:.3g} steps/s"
            )
            parts += [f"{duration(left)} left"] if left else []
        parts += [message] if message else []
        if self._bar is not None:
            self._bar.total, self._bar.n = self.total, step
            self._bar.set_postfix_str(", ".join(parts))
        elif self.due() or step >= self.total or at_once:
            self._spoke, self._first = time.monotonic(), False
            say(", ".join([f"step {step}/{self.total}", *parts]))

    def _rate_and_left(self, step: int) -> tuple[float | None, float | None]:
        """Steps a second, and how many seconds those that are left will take."""
        steps, seconds = self.pace.measure(step)
        if self._counted_from is None or seconds <= self._counted_from[1]:
            return None, None
        rate = (steps - self._counted_from[0]) / (seconds - self._counted_from[1])
        return (rate, (self.total - step) / rate) if rate else (None, None)
