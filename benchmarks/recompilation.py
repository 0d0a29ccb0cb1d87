"""Time that a run loses to compiling after its first step, as when layers shrink.

`python -m benchmarks.recompilation --config=configs/maestro.py`: trains a config in a
folder of its own, which is removed. Tracing, lowering and compiling are counted as jax
tells of them (`jax.monitoring`); with a compilation cache that knows the program,
little is left. Ends with one line of JSON.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks import report
from train import binary
from train.loop import train_and_evaluate
from train.report import logs

_COMPILING = "/jax/core/compile/"
_STEP = "jit(apply)"
"""How jax names the compiled training step."""


def measure(train: Callable[[], Any]) -> dict[str, float]:
    """Returns how long a run took, how long it compiled before its first step and after
    it, in s, how often the step was compiled, and the share that was lost.

    Args:
      train: Runs it.
    """
    spent = {"before": 0.0, "after": 0.0}
    steps = 0

    def note(event: str, seconds: float, **more: Any) -> None:
        nonlocal steps
        if not event.startswith(_COMPILING):
            return
        spent["after" if steps else "before"] += seconds
        steps += event.endswith("backend_compile_duration") and (
            more.get("fun_name") == _STEP
        )

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        began = time.perf_counter()
        train()
        whole = time.perf_counter() - began
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return {
        "seconds": whole,
        "compiling_before": spent["before"],
        "compiling_after": spent["after"],
        "steps_compiled": steps,
        "lost": spent["after"] / whole,
    }


def _define_flags() -> None:
    """Not when imported: other binaries have a flag of this name."""
    report.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config of the run.")
    flags.mark_flag_as_required("config")


def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        figures = measure(lambda: train_and_evaluate(flags.FLAGS.config, workdir))
    report.show_figures("A run that shrinks", figures)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
