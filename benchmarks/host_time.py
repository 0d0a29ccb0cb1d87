"""Time that a training step takes on the host, outside of what is compiled.

`python -m benchmarks.host_time --leaves=400`: a state of so many arrays, of a network
that computes next to nothing. The same steps called one by one from Python, ten in a
call (`config.steps_per_call`), and all in one compiled loop; what is between them is
the host's. Ends with one line of JSON.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import report, subjects
from configs import common
from lowrank_jax import factorize
from train import binary
from train.models import mlp
from train.phases import build_phases
from train.report import logs
from train.state import new_state
from train.step import make_train_step, make_train_steps

_TEN = 10
_ARRAYS_OF_A_LAYER = 6  # u, v, bias, and their momentum


def measure(leaves: int, steps: int, rounds: int) -> dict[str, float]:
    """Returns the arrays of the state, and milliseconds of a step: called, called in
    tens, compiled into a loop, and what is between them; medians over rounds."""
    hidden = (4,) * -(-leaves // _ARRAYS_OF_A_LAYER)
    dense = mlp.build(
        image_shape=(2, 2, 1), num_classes=10, rngs=nnx.Rngs(0), hidden=hidden
    )
    task, batch = subjects.images((2, 2, 1), 2)
    sgd = common.optimizer("sgd", learning_rate=0.01, args={"momentum": 0.9})
    until = {"steps": 1_000_000}
    sampler = common.named("single_layer")
    spec = common.phase(name="timed", until=until, optimizer=sgd, sampler=sampler)
    running = build_phases([spec])[0].begin(0, 1_000_000)
    structure, state = new_state(factorize(dense, [(".*", "full")]), running, 0)
    step = make_train_step(structure, running, task, jax.random.key(0))
    ten_steps = make_train_steps(step)
    batch = jax.device_put(batch)
    loop = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, steps, lambda _, state: step(state, batch)[0], state
        )
    )

    def called(state: Any) -> Any:
        for _ in range(steps):
            state, _ = step(state, batch)
        return state

    def in_tens(state: Any) -> Any:
        for _ in range(steps // _TEN):
            state, _ = ten_steps(state, [batch] * _TEN)
        return state

    def seconds(run: Any) -> float:
        own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        began = time.perf_counter()
        jax.block_until_ready(run(own))
        return (time.perf_counter() - began) / steps

    ways = (called, in_tens, loop)
    times = [list(map(seconds, ways)) for _ in range(rounds + 1)][1:]
    called_ms, in_tens_ms, compiled_ms = 1000 * np.median(times, axis=0)
    return {
        "leaves": len(jax.tree.leaves(state)),
        "called_ms": float(called_ms),
        "in_tens_ms": float(in_tens_ms),
        "compiled_ms": float(compiled_ms),
        "host_ms": float(called_ms - compiled_ms),
        "host_ms_in_tens": float(in_tens_ms - compiled_ms),
    }


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_integer("leaves", 400, "Arrays of the state, at least.", 1)
    flags.DEFINE_integer("steps", 200, "Steps to time, in tens.", _TEN)
    flags.DEFINE_integer("rounds", 5, "How often; the median counts.", 1)


def _main() -> None:
    given = flags.FLAGS
    figures = measure(given.leaves, given.steps, given.rounds)
    report.show_figures("A step of a deep, narrow MLP", figures)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
