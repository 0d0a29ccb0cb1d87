"""Share of the loop's time that is spent waiting for batches.

`python -m benchmarks.input_share --config=configs/shakespeare.py:cpu,dense`: the run
that this config describes, with its own reading ahead and its own step. Waiting is the
time until the next batch is handed over; the rest is the step. Beside it, what a batch
costs when nothing else runs: a step can hide as much as it takes itself. Ends with one
line of JSON.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks import report
from train import binary, start
from train.report import logs
from train.run import Run
from train.session import Session


def share_of(session: Session, batches: Iterator[Any], steps: int) -> dict[str, float]:
    """Returns the time of a step in ms, and which share of it is waiting for a batch.

    The first step, which is compiled, is not counted.

    Args:
      session: What is trained.
      batches: Its batches from its first step on; more than `steps`.
      steps: How many are timed.
    """
    jax.block_until_ready(session.train_step(0, next(batches)))
    waiting, began = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - asked
        jax.block_until_ready(session.train_step(step, batch))
    whole = time.perf_counter() - began
    return {"step_ms": 1000 * whole / steps, "waiting": waiting / whole}


def batch_alone(run: Run, steps: int) -> float:
    """Returns what a batch costs in ms where nothing else runs; epochs' orders too."""
    with contextlib.closing(run.batches_from(0)) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(next(batches))
    return 1000 * (time.perf_counter() - began) / steps


def _define_flags() -> None:
    """Not when imported: other binaries have a flag of this name."""
    report.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config of the run.")
    flags.DEFINE_integer("steps", 100, "Steps to time.", 1)
    flags.mark_flag_as_required("config")


def _main() -> None:
    config, steps = flags.FLAGS.config, flags.FLAGS.steps
    with contextlib.ExitStack() as resources:
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        session, _ = start.start_run(config, Path(folder) / "run", resources)
        batches = session.run.batches_from(0)
        resources.enter_context(contextlib.closing(batches))
        figures = share_of(session, batches, steps)
        batches.close()
        figures["batch_alone_ms"] = batch_alone(session.run, steps)
    report.show_figures("A run's batches", figures)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
