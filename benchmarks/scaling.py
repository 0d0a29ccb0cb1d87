"""Time and memory of a training step against width and depth, beside the formula.

`python -m benchmarks.scaling`: MLPs of square layers, dense and at fractions of their
ranks, ever wider and then ever deeper; the training loop's own step on random batches,
all forms of a size in turn. By the law a layer i x o takes, for each of B examples, i o
MACs if dense and r (i + o) at rank r; or, merged first, i o (1 + r / B), if that is
less. "of promise" is (law / dense law) / (time / dense time): 1 where a form is as
much faster as the law says. Memory is that of the compiled step. Ends with one line of
JSON.
"""

from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from flax import nnx

from benchmarks import report, subjects, timing
from lowrank_jax import factorize
from lowrank_jax.active import max_ranks
from train import binary
from train.models import mlp
from train.report import logs

FORMS: Mapping[str, Any] = {
    "dense": "dense",
    "1": "full",
    "0.5": {"rank_fraction": 0.5},
    "0.25": {"rank_fraction": 0.25},
    "0.125": {"rank_fraction": 0.125},
}
"""By name the rank rule of all layers but the head."""
_SIDE, _CLASSES = 16, 10


def law(width: int, depth: int, examples: int, ranks: Mapping[str, int]) -> float:
    """Returns the MACs of one example in a forward pass; layers without a rank are
    dense.

    >>> law(64, 1, 32, {"hidden/0": 8}) == 8 * (256 + 64) + 64 * 10
    True
    """
    sizes = [_SIDE * _SIDE, *[width] * depth]
    macs = float(width * _CLASSES)
    for index, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False)):
        rank = ranks.get(f"hidden/{index}")
        merged = i * o * (1 + (rank or 0) / examples)
        macs += merged if rank is None else min(merged, rank * (i + o))
    return macs


def measure(
    width: int, depth: int, examples: int, *, rounds: int, steps: int
) -> dict[str, dict[str, float]]:
    """Returns the rows of all forms of an MLP with so many hidden layers, by name."""
    task, batch = subjects.images((_SIDE, _SIDE, 1), examples)
    dense = mlp.build(
        image_shape=(_SIDE, _SIDE, 1),
        num_classes=_CLASSES,
        rngs=nnx.Rngs(0),
        hidden=(width,) * depth,
    )
    timers, laws = {}, {}
    for name, rule in FORMS.items():
        model = factorize(dense, [("head", "dense"), (".*", rule)])
        laws[name] = law(width, depth, examples, max_ranks(model))
        model = jax.tree.map(jax.numpy.copy, model)  # the step donates its state
        timers[name] = timing.make_timer(model, {}, task, jax.device_put(batch))
    times = timing.in_turn({n: t.timed for n, t in timers.items()}, rounds, steps)
    rows = timing.ratios(times, "dense")
    for name, row in rows.items():
        row["law"] = laws[name] / laws["dense"]
        row["of_promise"] = row["law"] / row["ratio"]
        row["mib"] = timers[name].memory / 2**20
        row["memory"] = timers[name].memory / timers["dense"].memory
    return rows


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_list("widths", [256, 512, 1024, 2048, 4096], "Of two hidden layers.")
    flags.DEFINE_list("depths", [2, 4, 8, 16], "Hidden layers of 1024 features.")
    flags.DEFINE_integer("batch_size", 256, "Examples of a step.", 1)
    flags.DEFINE_integer("rounds", 5, "Rounds; each form runs once in each.", 1)
    flags.DEFINE_integer("steps", 2, "Steps of each form in a round.", 1)


def _main() -> None:
    given, figures = flags.FLAGS, {}
    sizes = [(int(width), 2) for width in given.widths]
    sizes += [(1024, int(depth)) for depth in given.depths]
    for width, depth in dict.fromkeys(sizes):
        rows = measure(
            width, depth, given.batch_size, rounds=given.rounds, steps=given.steps
        )
        figures[f"{width}x{depth}"] = rows
        more = {"law": "law", "of promise": "of_promise", "MiB": "mib", "of": "memory"}
        title = f"Width {width}, {depth} hidden layers, batch {given.batch_size}"
        report.show_ratios(title, "form", rows, more)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
