"""What a run says: metrics to trackers, progress to stderr, results to stdout.

Of several processes, process 0 alone speaks.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from lowrank_jax.errors import UserError
from train import distributed
from train.report import trackers
from train.report.pace import Pace
from train.stopping import NotFinite

NONFINITE_GRADIENT = "nonfinite_gradient"
"""The step's metric that says which parameter's gradient is the first that is not
finite, -1 if all are; no figure of its own."""
_WORTH_SAYING = 1.0
"""Seconds; what is over sooner needs no line at its end."""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts with their keys joined by "/"."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any, where: str) -> Any:
    """Turns NumPy and JAX values into what JSON holds; NaN and infinity into null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v, f"{where}/{key}") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(
        f"{where}: must be a number, text, an array or a dict of them, got "
        f"{type(value).__name__}. Convert it before it is logged."
    )


class MetricWriter:
    """Writes metrics to workdir/metrics.jsonl, to TensorBoard and to further trackers.

    Process 0 does; on others, nothing is opened.

    Args:
      workdir: Folder of the run; made if missing.
      start_step: The step the run starts after; 0 for a new run. What an earlier
        attempt wrote after it is dropped.
      config: The run's config, for the further ones.
      further: What opens them.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start_step: int,
        config: Mapping[str, Any] | None = None,
        further: Sequence[trackers.OpenTracker] = (),
    ):
        self._trackers: list[trackers.Tracker] = []
        if not distributed.is_first():
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._trackers.append(trackers.Lines(workdir, start_step))
        self._trackers.append(trackers.TensorBoard(workdir, start_step))
        self._trackers += [
            open_tracker(workdir, config or {}, start_step) for open_tracker in further
        ]

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hands over the metrics of a step; nested names are joined with "/"."""
        flat = {name: _plain(value, name) for name, value in flatten(metrics)}
        if "step" in flat:
            raise UserError("metrics: 'step' is taken by the step itself. Rename it.")
        for tracker in self._trackers:
            tracker.write(int(step), flat)

    def close(self) -> None:
        """Ends every tracker, whatever becomes of the others."""
        with contextlib.ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def duration(seconds: float) -> str:
    """Writes seconds as minutes and seconds, with hours if there are some.

    >>> duration(75)
    '01:15'
    """
    return tqdm.tqdm.format_interval(seconds)


def say(message: str) -> None:
    """Prints a line on stderr that leaves a progress bar whole; process 0 does."""
    if distributed.is_first():
        tqdm.tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Says what is done next, and how long it took if that was long."""
    say(f"{what} ...")
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    if seconds >= _WORTH_SAYING:
        say(f"{what}: done in {seconds:.1f} s")


class StepMetrics:
    """Metrics of steps, left on the device until they are logged together.

    Args:
      writer: Where their means go.
      batch_size: Examples in a step, for the rate.
      pace: Of the steps, where the rate is to be among the metrics.
      saved_step: Step of the last checkpoint, None without one; to be set after a save.
      names: Paths of the parameters, in the order in which the step's metric
        `NONFINITE_GRADIENT` counts them; to be set anew when they change.
    """

    def __init__(
        self,
        writer: MetricWriter,
        batch_size: int,
        *,
        pace: Pace | None = None,
        saved_step: int | None = None,
        names: Sequence[str] = (),
    ):
        self._writer, self._batch_size = writer, batch_size
        self.saved_step, self.names = saved_step, names
        self._pending: list[tuple[range, Mapping[str, Any]]] = []
        self._pace, self._before = pace, (0, 0.0)

    def add(self, step: int, metrics: Mapping[str, Any], count: int = 1) -> None:
        """Notes the metrics of a step without waiting for them, or of so many up to it,
        with a leading axis."""
        self._pending.append((range(step - count + 1, step + 1), metrics))

    def wait(self) -> None:
        """Waits until the steps are done whose metrics it holds."""
        jax.block_until_ready([metrics for _, metrics in self._pending])

    def flush(self) -> str:
        """Writes the means since the last call; returns a short summary.

        Raises:
          NotFinite: A loss or a gradient is not finite; names the steps and the
            parameter.
        """
        if not self._pending:
            return ""
        steps = [step for at_once, _ in self._pending for step in at_once]
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        values = []
        for (at_once, _), metrics in zip(self._pending, fetched, strict=True):
            if len(at_once) == 1:
                values.append(dict(metrics))
            else:
                several = range(len(at_once))
                values += [{k: x[n] for k, x in metrics.items()} for n in several]
        self._pending = []
        bad = [n for n, metrics in enumerate(values) if not _finite(metrics)]
        if bad:
            last = steps[bad[-1]]
            raise NotFinite(
                f"{_place_of(values[bad[0]])}: must be finite, got NaN or infinity at"
                f" step {_range(steps[bad[0]], last)}{self._whose(values[bad[0]])}."
                " Lower config.phases[...].optimizer.learning_rate or set its clip_norm"
                f"; {_what_is_saved(self.saved_step)}."
            )
        for metrics in values:
            metrics.pop(NONFINITE_GRADIENT, None)
        means = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
        if (rate := self._rate(steps[-1])) is not None:
            means["examples_per_s"] = rate * self._batch_size
        self._writer.write(steps[-1], {"train": means})
        summary = f"loss {means['loss']:.4f}"
        if "loss_pass_1" in means:  # "loss" is what is minimized: of all passes
            summary += f", of the first pass {means['loss_pass_0']:.4f}"
        return summary

    def _rate(self, step: int) -> float | None:
        """Steps a second since the last call; None without any that was timed."""
        if self._pace is None:
            return None
        now, (steps, seconds) = self._pace.measure(step), self._before
        self._before = now
        return (now[0] - steps) / (now[1] - seconds) if now[1] > seconds else None

    def _whose(self, metrics: Mapping[str, Any]) -> str:
        """The parameter whose gradient was not finite, if one was."""
        index = int(metrics.get(NONFINITE_GRADIENT, -1))
        if not 0 <= index < len(self.names):
            return ""
        return f" (first gradient that is not finite: {self.names[index]})"


def _place_of(metrics: Mapping[str, Any]) -> str:
    return "gradient" if np.isfinite(metrics["loss"]).all() else "loss"


def _finite(metrics: Mapping[str, Any]) -> bool:
    gradients = metrics.get(NONFINITE_GRADIENT, -1) < 0
    return gradients and all(np.isfinite(value).all() for value in metrics.values())


def _what_is_saved(step: int | None) -> str:
    if step is None:
        return "no checkpoint was saved before"
    return f"the last checkpoint is of step {step}"


def _range(first: int, last: int) -> str:
    """Steps as text: "7", or "7 to 9" for the first and last of several."""
    return str(first) if first == last else f"{first} to {last}"


def emit(figures: Mapping[str, Any]) -> None:
    """Prints results as one line of JSON on stdout, meant to be its last line.

    NumPy and JAX values become plain ones; NaN and infinity, which JSON lacks, null.
    """
    sys.stderr.flush()
    print(json.dumps(_plain(figures, "figures"), allow_nan=False), flush=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a plain text table, numbers to the right and text to the left.

    >>> print(table(["layer", "rank"], [["up", 8], ["down", 16]]))
    layer  rank
    -----  ----
    up        8
    down     16
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise UserError(
                f"table: rows must have {len(headers)} cells, got {len(row)}: {row}."
                " Fill them up."
            )
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [_is_numeric([row[i] for row in rows]) for i in range(len(headers))]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_numeric(values: Sequence[Any]) -> bool:
    return bool(values) and not any(isinstance(value, str) for value in values)


def _cell(value: Any) -> str:
    value = value if isinstance(value, str) else _plain(value, "table")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
