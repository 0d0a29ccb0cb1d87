"""Time of penalties over all layers of ResNet-18, as a share of its training step.

`python -m benchmarks.penalty_time`: value and gradient of each penalty on the model
factored at full rank, against the training loop's own step at batch 128, round by round
in one run; the share is the median over rounds. Spectral penalties run every n steps
(n in the config), which divides their share. Ends with one line of JSON.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import report, subjects, timing
from lowrank_jax import factorize, find_factors
from lowrank_jax.penalties import PENALTIES, stateful
from train import binary
from train.report import logs

EVERY = {"stable_rank": 20, "modified_stable_rank": 20}
"""How many steps the spectral penalties are spread over; 1 for the others."""


def arguments(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Arguments of each penalty; numbers that have no default are 1."""
    half = {
        path: -(-factors.max_rank // 2) for path, factors in find_factors(model).items()
    }
    every: dict[str, dict[str, Any]] = {
        name: {
            key: 1.0
            for key, parameter in inspect.signature(make).parameters.items()
            if key != "weight" and parameter.default is inspect.Parameter.empty
        }
        for name, make in PENALTIES.items()
    }
    annealed = {"start": 1.0, "end": 0.1, "anneal_steps": 100}
    every["log_determinant"] = {"every_steps": 20, **annealed}
    every["modified_stable_rank"] = {"target_ranks": half}
    every["funnel"] = annealed
    return every


def make_timer(
    model: nnx.Module, name: str, args: dict[str, Any]
) -> Callable[[], float]:
    """Makes a function that times one value and gradient, in seconds."""
    penalty = stateful(PENALTIES[name](weight=1.0, **args))
    state = penalty.init(model)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def compute(params: Any) -> Any:
        def value(params: Any) -> jax.Array:
            merged = nnx.merge(graphdef, params, rest, copy=True)
            return penalty.apply(merged, state, 0)[0]

        return jax.value_and_grad(value)(params)

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(compute(params))
        return time.perf_counter() - began

    timed()  # compiles
    return timed


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_integer("rounds", 3, "Rounds; each penalty runs once in each.", 1)
    flags.DEFINE_integer("steps", 1, "Training steps in a round.", 1)
    flags.DEFINE_integer("batch_size", 128, "Examples of a training step.", 1)


def _main() -> None:
    given, size = flags.FLAGS, flags.FLAGS.batch_size
    subject = subjects.make("resnet18", size)
    models = {
        s: factorize(subject.dense, [(".*", {"with_s": s})]) for s in (False, True)
    }
    batch = jax.device_put(subject.batch)
    step = timing.make_timer(models[False], {}, subject.task, batch).timed
    on_s = ("orthogonality", "l1", "hoyer", "hoyer_square")
    timers = {
        name: make_timer(models[name in on_s], name, args)
        for name, args in arguments(models[False]).items()
    }
    times = {name: [] for name in ["step", *timers]}
    for _ in range(given.rounds):
        times["step"].append(step(given.steps))
        for name, timed in timers.items():
            times[name].append(timed())
    steps = np.asarray(times["step"])
    figures = {}
    for name, values in times.items():
        n = EVERY.get(name, 1)
        figures[name] = {
            "ms": 1000 * float(np.median(values)),
            "every_steps": n,
            "share_of_step": float(np.median(np.asarray(values) / steps)) / n,
        }
    rows = [
        [k, v["ms"], v["every_steps"], v["share_of_step"]] for k, v in figures.items()
    ]
    headers = ["penalty", "ms", "every steps", "share of the step"]
    report.show(f"ResNet-18, batch {size}", headers, rows)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
