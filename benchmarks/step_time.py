"""Time of an ordered-dropout step against a dense step, as ratios from one run.

`python -m benchmarks.step_time`: LeNet at batch 128 and a ViT, on random images, and
the language model of configs/shakespeare.py:cpu at batch 32, on random tokens. The
steps are the training loop's own (`train.step`), optimizer and all. Variants are timed
in turn, round by round, so that a machine that slows down slows all of them; the ratio
is the median over rounds. Ends with one line of JSON.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from configs import common, shakespeare
from configs import text as text_configs
from lowrank_jax import factorize
from lowrank_jax.active import max_ranks
from lowrank_jax.ranks import at_fraction
from lowrank_jax.shrinking import shrink
from train import binary
from train.models import lenet, transformer, vit
from train.phases import build_phases
from train.report import logs
from train.state import new_state
from train.step import make_train_step
from train.tasks.base import Task
from train.tasks.classification import classification
from train.tasks.language_model import language_model

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds; each variant runs once in each.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of each variant in a round.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
_TEXT_BATCH = 32

Timed = Callable[[int], float]


class Subject(NamedTuple):
    """A dense model, what it learns, from what, and which layers become low-rank."""

    dense: nnx.Module
    task: Task
    batch: dict[str, Any]
    rules: Sequence[tuple[str, Any]] = ((".*", "full"),)


def make_timer(
    model: nnx.Module, sampler: str, task: Task, batch: Mapping[str, Any]
) -> Timed:
    """Makes a function that runs training steps and says how long one took, in s.

    Args:
      model: The model to train.
      sampler: Name of a rank sampler that takes no arguments.
      task: What is learned.
      batch: What it is learned from.
    """
    spec = common.phase(
        name="timed",
        until={"steps": 1_000_000},
        sampler=common.named(sampler),
        optimizer=common.optimizer("sgd", learning_rate=0.01, args={"momentum": 0.9}),
    )
    (phase,) = build_phases([spec])
    running = phase.begin(0, 1_000_000, None)
    structure, first = new_state(model, running, 0)
    step = make_train_step(structure, running, task, jax.random.key(0))
    holder = [jax.tree.map(jax.numpy.copy, first)]

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            holder[0], metrics = step(holder[0], batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / count

    timed(2)  # compiles
    return timed


def images(shape: tuple[int, ...], size: int) -> tuple[Task, dict[str, Any]]:
    """Returns a classification with ten classes and a random batch of it."""
    image = {"shape": list(shape), "dtype": "uint8"}
    arrays = {"image": image, "label": {"shape": [], "dtype": "int32"}}
    facts = {"arrays": arrays, "num_classes": 10}
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (size, *shape), dtype=np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
    return classification(facts, mean=[33.3], std=[78.6], augment=[]), batch


def windows(context: int, size: int) -> tuple[Task, dict[str, Any]]:
    """Returns a language model's task with 65 tokens and a random batch of it."""
    arrays = {"tokens": {"shape": [context + 1], "dtype": "uint8"}}
    tokens = np.random.default_rng(0).integers(0, 65, (size, context + 1))
    task = language_model({"arrays": arrays, "vocab_size": 65})
    return task, {"tokens": tokens.astype(np.uint8)}


def variants(
    dense: nnx.Module, rules: Sequence[tuple[str, Any]] = ((".*", "full"),)
) -> dict[str, tuple[nnx.Module, str]]:
    """Returns what is timed: dense, ordered dropout at full rank, shrunk models."""
    low_rank = factorize(dense, rules)
    cut = {}
    for fraction in (0.5, 0.25):
        ranks = at_fraction(max_ranks(low_rank), fraction)
        optimizer = optax.sgd(0.01)
        params = nnx.as_pure(nnx.state(low_rank, nnx.Param))
        small = shrink(low_rank, ranks, optimizer.init(params), optimizer).model
        cut[f"shrunk to {fraction}"] = (small, "single_layer")
    return {
        "dense": (dense, "full"),
        "single_layer at full rank": (low_rank, "single_layer"),
        "uniform_fraction at full rank": (low_rank, "uniform_fraction"),
        **cut,
    }


def measure(
    timers: Mapping[str, Timed], rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Returns the median time of a step and its ratio to the first variant's."""
    times = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timed in timers.items():
            times[name].append(timed(count))
    base = np.asarray(next(iter(times.values())))
    return {
        name: {
            "ms": 1000 * float(np.median(values)),
            "ratio_to_dense": float(np.median(np.asarray(values) / base)),
        }
        for name, values in times.items()
    }


def subjects(size: int) -> dict[str, Subject]:
    """Returns what is timed, by name."""
    lenet_shape, vit_shape = (28, 28, 1), (16, 16, 3)
    config = shakespeare.get_config("cpu")
    task, batch = windows(config.data.args.context, _TEXT_BATCH)
    text = transformer.build(
        **task.model_args, **config.model["args"], rngs=nnx.Rngs(0)
    )
    return {
        "lenet": Subject(
            lenet.build(image_shape=lenet_shape, num_classes=10, rngs=nnx.Rngs(0)),
            *images(lenet_shape, size),
        ),
        "vit": Subject(
            vit.build(image_shape=vit_shape, num_classes=10, rngs=nnx.Rngs(0)),
            *images(vit_shape, size),
        ),
        "shakespeare:cpu": Subject(text, task, batch, text_configs.rank_rules("full")),
    }


def _main() -> None:
    figures = {}
    for name, subject in subjects(_BATCH.value).items():
        batch = jax.device_put(subject.batch)
        size = len(next(iter(batch.values())))
        timers = {
            variant: make_timer(model, sampler, subject.task, batch)
            for variant, (model, sampler) in variants(
                subject.dense, subject.rules
            ).items()
        }
        figures[name] = measure(timers, _ROUNDS.value, _STEPS.value)
        rows = [[k, v["ms"], v["ratio_to_dense"]] for k, v in figures[name].items()]
        print(f"\n{name}, batch {size}, {jax.devices()[0].device_kind}")
        print(logs.table(["step", "ms", "ratio to dense"], rows))
    logs.emit(figures)


if __name__ == "__main__":
    binary.run(_main)
