"""What a run says: metrics to files, progress to stderr, results to stdout."""

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
import tensorboardX
import tqdm

from lowrank_jax.errors import UserError
from train.stopping import NotFinite

_SECONDS_BETWEEN_LINES = 5.0


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
    """Writes metrics to workdir/metrics.jsonl and, if numbers, to TensorBoard.

    A run that resumes drops what an earlier attempt wrote after `start_step`, so that
    every step is there once.

    Args:
      workdir: Folder of the run; made if missing.
      start_step: The step the run starts after; 0 for a new run.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int):
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_lines_after(path, start_step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line; nested names are joined with "/"."""
        flat = {name: _plain(value, name) for name, value in flatten(metrics)}
        if "step" in flat:
            raise UserError("metrics: 'step' is taken by the step itself. Rename it.")
        self._lines.write(json.dumps({"step": int(step), **flat}) + "\n")
        self._lines.flush()
        for name, value in flat.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut short when the earlier attempt was killed
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


class Progress:
    """A bar when stderr is a terminal, else a line every few seconds.

    The first step after `compiling` is named so, and is left out of the rate: it takes
    as long as thousands of others.

    Args:
      total: The last step; may be set anew.
      start: Steps already done.
    """

    def __init__(self, total: int, *, start: int = 0):
        self.total = total
        self._counted_from, self._began = start, time.monotonic()
        self._spoke = self._began
        self._compiling = False
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=start, file=sys.stderr, dynamic_ncols=True
            )

    def compiling(self, step: int) -> None:
        """Says, before the step after `step` runs, that it is compiled first."""
        self._compiling = True
        if self._bar is not None:
            self._bar.set_postfix_str("compiling")
        else:
            say(f"step {step}/{self.total}, compiling ...")

    def update(self, step: int, message: str = "") -> None:
        """Shows that `step` steps are done, with `message` beside it."""
        now = time.monotonic()
        if self._compiling:  # the clock starts when the compiled step is done
            self._compiling = False
            self._counted_from, self._began = step, now
            if self._bar is not None:
                self._bar.unpause()
                self._bar.set_postfix_str("", refresh=False)
        if self._bar is not None:
            if message:
                self._bar.set_postfix_str(message, refresh=False)
            self._bar.total = self.total
            self._bar.update(step - self._bar.n)
            return
        if step < self.total and now - self._spoke < _SECONDS_BETWEEN_LINES:
            return
        self._spoke = now
        line = f"step {step}/{self.total}{self._pace(step, now)}"
        print(f"{line}, {message}" if message else line, file=sys.stderr, flush=True)

    def _pace(self, step: int, now: float) -> str:
        """Steps a second and, if some are left, how long they will take."""
        done, seconds = step - self._counted_from, now - self._began
        if done <= 0 or seconds <= 0:
            return ""
        rate, left = done / seconds, self.total - step
        remaining = f", {tqdm.tqdm.format_interval(left / rate)} left" if left else ""
        return f", {rate:.3g} steps/s{remaining}"

    def close(self) -> None:
        """Ends the bar, so that later output starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()


def say(message: str) -> None:
    """Prints a line on stderr that leaves a progress bar whole."""
    tqdm.tqdm.write(message, file=sys.stderr)


class StepMetrics:
    """Metrics of steps, left on the device until they are logged together.

    Args:
      writer: Where their means go.
      batch_size: Examples in a step, for the rate.
      saved_step: Step of the last checkpoint, None without one; to be set after a save.
    """

    def __init__(
        self,
        writer: MetricWriter,
        batch_size: int,
        *,
        saved_step: int | None = None,
    ):
        self._writer, self._batch_size = writer, batch_size
        self.saved_step = saved_step
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._timed, self._began = 0, None

    def compiling(self) -> None:
        """Leaves the next step, which is compiled first, out of the rate."""
        self._timed, self._began = 0, None

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes the metrics of a step without waiting for them."""
        self._pending.append((step, metrics))
        if self._began is None:
            self._timed, self._began = 0, time.perf_counter()
        else:
            self._timed += 1

    def flush(self) -> str:
        """Writes the means since the last call; returns a short summary.

        Raises:
          NotFinite: A loss is not finite; names the steps.
        """
        if not self._pending:
            return ""
        steps = [step for step, _ in self._pending]
        values = jax.device_get([metrics for _, metrics in self._pending])
        self._pending = []
        bad = [s for s, v in zip(steps, values, strict=True) if not _finite(v)]
        if bad:
            raise NotFinite(
                f"loss: must be finite, got NaN or infinity at step {_ranges(bad)}."
                " Lower config.phases[...].optimizer.learning_rate or set its clip_norm"
                f"; {_what_is_saved(self.saved_step)}."
            )
        means = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
        now = time.perf_counter()
        if self._timed:
            rate = self._timed * self._batch_size / (now - self._began)
            means["examples_per_s"] = rate
        self._timed, self._began = 0, now
        self._writer.write(steps[-1], {"train": means})
        return f"loss {means['loss']:.4f}"


def _finite(metrics: Mapping[str, Any]) -> bool:
    return all(np.isfinite(value).all() for value in metrics.values())


def _what_is_saved(step: int | None) -> str:
    if step is None:
        return "no checkpoint was saved before"
    return f"the last checkpoint is of step {step}"


def _ranges(steps: Sequence[int]) -> str:
    """Steps as text: "7", or "7 to 9" for the first and last of several."""
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


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
