"""Time of low-rank training steps against a dense step, as ratios from one run.

`python -m benchmarks.step_time --subjects=lenet,resnet18`: the training loop's own step
(`train.step`), optimizer and all, on random batches. Variants run in turn, round by
round, so that a machine that slows down slows all of them; the ratio is the median over
rounds, the spread half the distance of its quartiles. `--variants` takes a regular
expression of their names. Ends with one line of JSON.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from absl import flags
from flax import nnx

from benchmarks import report, subjects, timing
from configs import common, sizes
from lowrank_jax import factorize
from lowrank_jax.active import max_ranks
from lowrank_jax.ranks import at_fraction
from lowrank_jax.shrinking import shrink
from train import binary
from train.report import logs

LASSO = (common.named("hierarchical_group_lasso", weight=1e-4),)


class Variant(NamedTuple):
    """A step that is timed: of a model, with these keys of its phase."""

    model: nnx.Module
    phase: dict[str, Any]


def variants(
    dense: nnx.Module, rules: Sequence[tuple[str, Any]] = ((".*", "full"),)
) -> dict[str, Variant]:
    """Returns what is timed, by name; the first is dense."""
    low_rank = factorize(dense, rules)
    named = common.named

    def full(name: str, **changes: Any) -> Variant:
        return Variant(low_rank, {"sampler": named(name), **changes})

    def nested(keys: dict[str, Any]) -> Variant:
        teacher = named("full", target_weight=0.0)
        return Variant(low_rank, {"teacher": teacher, **keys})

    found = {
        "dense": Variant(dense, {}),
        "full": full("full"),
        "single_layer": full("single_layer"),
        "single_layer, hierarchical lasso": full("single_layer", penalties=LASSO),
        "uniform_fraction": full("uniform_fraction"),
        **{f"nested, {word}": nested(keys) for word, keys in sizes.STEPS.items()},
    }
    for fraction in (0.5, 0.25):
        ranks = at_fraction(max_ranks(low_rank), fraction)
        optimizer = optax.sgd(0.01)
        params = nnx.as_pure(nnx.state(low_rank, nnx.Param))
        small = shrink(low_rank, ranks, optimizer.init(params), optimizer).model
        only = named("uniform_fraction", fractions=(fraction,))
        found[f"{fraction}, masked"] = Variant(low_rank, {"sampler": only})
        found[f"{fraction}, shrunk"] = Variant(small, {"sampler": named("full")})
    return found


def measure(
    subject: subjects.Subject, chosen: str, rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Times the variants whose names match, and the dense step; returns the rows."""
    batch = jax.device_put(subject.batch)
    timers = {
        name: timing.make_timer(
            jax.tree.map(jax.numpy.copy, variant.model),
            variant.phase,
            subject.task,
            batch,
        )
        for name, variant in variants(subject.dense, subject.rules).items()
        if name == "dense" or re.search(chosen, name)
    }
    times = timing.in_turn({n: t.timed for n, t in timers.items()}, rounds, count)
    rows = timing.ratios(times, "dense")
    for name, timer in timers.items():
        rows[name]["flops_ratio"] = timer.flops / timers["dense"].flops
        rows[name]["mib"] = timer.memory / 2**20
    return rows


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_list(
        "subjects",
        ["lenet", "resnet18", "vit", "shakespeare:cpu"],
        f"What to time, of {list(subjects.SUBJECTS)}.",
    )
    flags.DEFINE_string("variants", ".*", "Which variants, beside dense.")
    flags.DEFINE_integer("rounds", 7, "Rounds; each variant runs once in each.")
    flags.DEFINE_integer("steps", 5, "Steps of each variant in a round.")
    flags.DEFINE_integer("batch_size", 0, "Examples; 0 for the subject's own.")


def _main() -> None:
    given, figures = flags.FLAGS, {}
    for name in given.subjects:
        subject = subjects.make(name, given.batch_size)
        rows = measure(subject, given.variants, given.rounds, given.steps)
        figures[name] = rows
        size = len(next(iter(subject.batch.values())))
        more = {"operations": "flops_ratio", "MiB": "mib"}
        report.show_ratios(f"{name}, batch {size}", "step", rows, more)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
