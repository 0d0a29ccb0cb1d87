"""How good a nested model is at ranks that it was not trained at.

`python -m benchmarks.any_rank --checkpoint=runs/nested`: judges a run's last model at
many fractions of its ranks, and at vectors of ranks drawn layer by layer. The first
table has what each fraction loses to the straight line between the trained fractions
beside it, the second what the vectors lose to the fraction of equal MACs (on a straight
line between the two beside it). Ends with one line of JSON.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from benchmarks import report
from configs import sizes
from lowrank_jax import active, families
from lowrank_jax.families import Family
from lowrank_jax.ranks import Ranks
from train import binary, opening
from train.report import logs
from train.state import split_model

Rows = Sequence[Mapping[str, float]]


def fractions(count: int, smallest: float) -> list[float]:
    """Returns so many fractions from 1 to the smallest, in equal ratios.

    >>> fractions(3, 0.25)
    [1.0, 0.5, 0.25]
    """
    return [float(x) for x in np.round(np.geomspace(1.0, smallest, count), 4)]


def draw(
    family: Family, ranks: Ranks, smallest: float, rng: np.random.Generator
) -> Ranks:
    """Draws a size for each layer, its logarithm uniform, down to the smallest."""
    least = np.log(smallest)
    sizes = {path: float(np.exp(rng.uniform(least, 0.0))) for path in ranks}
    return {p: families.member(family, ranks, sizes[p])[p] for p in ranks}


def losses(rows: Rows, known: Rows, by: str, figure: str) -> list[float]:
    """Returns what a figure of each row is above that of a straight line.

    >>> line = [{"x": 0.0, "loss": 1.0}, {"x": 2.0, "loss": 3.0}]
    >>> losses([{"x": 1.0, "loss": 2.5}], line, "x", "loss")
    [0.5]

    Args:
      rows: Whose.
      known: The corners of the line.
      by: What it is straight in.
      figure: What is compared.
    """
    known = sorted(known, key=lambda row: row[by])
    x, y = ([row[key] for row in known] for key in (by, figure))
    return [float(row[figure] - np.interp(row[by], x, y)) for row in rows]


def measure(
    opened: opening.Opened,
    split: str,
    *,
    trained: Sequence[float],
    count: int,
    vectors: int,
    recalibration_batches: int = 0,
    seed: int = 0,
) -> dict[str, list[dict[str, float]]]:
    """Returns the rows of the fractions, and of the drawn vectors.

    Each has what it costs ("macs"), its "loss" and the task's headline, and how far the
    two are from their lines, under "loss_lost" and so on, worse above 0.

    Args:
      opened: The run's model.
      split: On which it is judged.
      trained: Fractions that it was trained at; the smallest ends the frontier.
      count: How many fractions are judged.
      vectors: How many vectors are drawn.
      recalibration_batches: To re-estimate BatchNorm on at each.
      seed: Of the draws.
    """
    task, (_, params, state) = opened.run.task, split_model(opened.model)
    evaluator = opened.evaluator(split, recalibration_batches, translate=False)
    ranks, smallest = active.get_ranks(opened.model), min(trained)
    names = dict.fromkeys(("loss", task.headline))

    def judged(ranks: Ranks, **more: float) -> dict[str, float]:
        found = evaluator.at(params, state, ranks)
        return {**more, "macs": found["macs"], **{name: found[name] for name in names}}

    def at(fraction: float) -> dict[str, float]:
        lower = families.member(opened.family, ranks, fraction)
        return judged(lower, fraction=fraction)

    at_trained = [at(fraction) for fraction in trained]
    rows = [at(fraction) for fraction in fractions(count, smallest)]
    rng = np.random.default_rng(seed)
    given = (opened.family, ranks, smallest)
    drawn = [judged(draw(*given, rng)) for _ in range(vectors)]
    for name in names:
        sign = -1 if name == task.headline and task.higher_is_better else 1
        for each, known, by in ((rows, at_trained, "fraction"), (drawn, rows, "macs")):
            for row, lost in zip(each, losses(each, known, by, name), strict=True):
                row[f"{name}_lost"] = sign * lost
    return {"fractions": rows, "vectors": drawn}


def quartiles(rows: Rows) -> list[list[float | str]]:
    """Returns for each figure the quartiles of what rows lose, and the worst."""
    names = [name for name in rows[0] if name.endswith("_lost")]
    each = {name: [row[name] for row in rows] for name in names}
    return [
        [name.removesuffix("_lost"), *map(float, np.percentile(x, [25, 50, 75, 100]))]
        for name, x in each.items()
    ]


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or a checkpoint.")
    flags.DEFINE_enum("split", "validation", ["validation", "test"], "Which examples.")
    trained = [str(f) for f in sizes.FRACTIONS]
    flags.DEFINE_list("trained", trained, "Fractions that it was trained at.")
    flags.DEFINE_integer("fractions", 24, "How many fractions are judged.", 2)
    flags.DEFINE_integer("vectors", 100, "How many vectors are drawn.", 1)
    flags.DEFINE_integer(
        "recalibration_batches", 0, "To re-estimate BatchNorm on at each.", 0
    )
    flags.DEFINE_list("allow_imports", [], "Packages that names may be imported from.")
    flags.mark_flag_as_required("checkpoint")


def _main() -> None:
    given = flags.FLAGS
    opened = opening.open_model(given.checkpoint, allow_imports=given.allow_imports)
    found = measure(
        opened,
        given.split,
        trained=[float(f) for f in given.trained],
        count=given.fractions,
        vectors=given.vectors,
        recalibration_batches=given.recalibration_batches,
    )
    about = f"{opened.run.data.name}, {given.split} split"
    headers = list(found["fractions"][0])
    cells = [list(row.values()) for row in found["fractions"]]
    report.show(f"Fractions of the ranks, {about}", headers, cells)
    headers = ["figure", "quartile", "median", "quartile", "worst"]
    title = f"What {given.vectors} drawn vectors lose to fractions, {about}"
    report.show(title, headers, quartiles(found["vectors"]))
    logs.emit(found)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
