"""How benchmarks time training steps: in turn, as ratios from one run."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import common
from train.phases import build_phases
from train.state import new_state
from train.step import make_train_step
from train.tasks.base import Task


class Timer(NamedTuple):
    """A training step that can be timed.

    Args:
      timed: Runs so many steps, and says how long one took, in s.
      flops: Operations of a step, as XLA counts them: of a choice between several
        programs all are counted.
      memory: Bytes of its arguments, outputs and temporary arrays.
    """

    timed: Callable[[int], float]
    flops: float
    memory: int


def make_timer(
    model: nnx.Module, spec: Mapping[str, Any], task: Task, batch: Mapping[str, Any]
) -> Timer:
    """Compiles the training loop's own step.

    Args:
      model: The model to train.
      spec: Keys of the phase that differ from plain SGD with momentum.
      task: What is learned.
      batch: What it is learned from.
    """
    sgd = common.optimizer("sgd", learning_rate=0.01, args={"momentum": 0.9})
    until = {"steps": 1_000_000}
    given = {"name": "timed", "until": until, "optimizer": sgd, **spec}
    (phase,) = build_phases([common.phase(**given)])
    running = phase.begin(0, 1_000_000)
    structure, first = new_state(model, running, 0)
    step = make_train_step(structure, running, task, jax.random.key(0))
    state = jax.tree.map(jnp.copy, first)
    compiled = step.lower(state, batch).compile()
    holder = [state]

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            holder[0], metrics = compiled(holder[0], batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / count

    timed(2)
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes
    size += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return Timer(timed, compiled.cost_analysis()["flops"], size)


def in_turn(
    timers: Mapping[str, Callable[[int], float]], rounds: int, count: int
) -> dict[str, list[float]]:
    """Runs every variant once a round; returns the times of each, in s.

    A step before them is not timed: where variants need gigabytes, the first step of
    each asks the system for the pages that the one before it has handed back.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timed in timers.items():
            timed(1)
            times[name].append(timed(count))
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Returns for each variant the median time and, round by round, its ratio to one.

    A machine that slows down slows all variants of a round. The spread is half the
    distance between the quartiles of the ratio.
    """
    rows = {}
    for name, values in times.items():
        ratio = np.asarray(values) / np.asarray(times[base])
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        rows[name] = {
            "ms": 1000 * float(np.median(values)),
            "ratio": float(middle),
            "spread": float(high - low) / 2,
        }
    return rows
