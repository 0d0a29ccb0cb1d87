"""Predicted time of cut models against the measured one.

`python -m benchmarks.latency --subjects=lenet,vit_s4`: measures the table of layers
(`lowrank_jax.latency`), predicts the time of models at several rank vectors, each layer
in its fastest form, and measures these models in turn with the dense one. Then it asks
for half of the dense model's time, as `train.truncate --latency=0.5` does, and measures
what comes of it. Times are shares of the dense model's. Ends with one line of JSON.
"""

from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from benchmarks import report, subjects
from lowrank_jax import factorize, latency, surgery, truncate
from lowrank_jax.active import max_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.forms import FORMS
from lowrank_jax.ranks import Ranks, at_fraction
from lowrank_jax.selection import choosing
from lowrank_jax.selection.selectors import SELECTORS
from lowrank_jax.times import MERGED, ModelTimes
from train import binary, timing
from train.report import logs


def rank_vectors(ranks: Ranks, seed: int) -> dict[str, Ranks]:
    """Returns two common fractions and a rank of its own for each layer."""
    rng = np.random.default_rng(seed)
    mixed = {path: int(rng.integers(1, rank + 1)) for path, rank in ranks.items()}
    halves = {f"{x:g} of the ranks": at_fraction(ranks, x) for x in (0.5, 0.125)}
    return {**halves, "random ranks": mixed}


def in_fastest_form(model: nnx.Module, ranks: Ranks, times: ModelTimes) -> nnx.Module:
    """Returns the model cut, each layer in the form that the table has as fastest."""
    forms = {path: times.layers[path].fastest(rank) for path, rank in ranks.items()}
    return surgery.take_forms(truncate(model, ranks), forms)


def measure(
    subject: subjects.Subject, share: float, rounds: int, table: str | None
) -> dict[str, dict[str, Any]]:
    """Returns rows: predicted and measured shares of the dense model's time."""
    model = factorize(subject.dense, subject.rules)
    example = subject.task.inputs(subject.batch, None)
    forms = (*FORMS, MERGED)
    times = latency.LatencyTable(table).times(model, *example, forms=forms)

    def measured(several: dict[str, Ranks]) -> dict[str, float]:
        models = {n: in_fastest_form(model, r, times) for n, r in several.items()}
        models["dense"] = surgery.merge(model)
        found = latency.measure(models, *example, rounds=rounds)
        return {name: one / found["dense"] for name, one in found.items()}

    vectors = rank_vectors(max_ranks(model), 0)
    found = measured(vectors)
    rows = {
        name: {"predicted": times.predict(ranks) / times.dense, "measured": found[name]}
        for name, ranks in vectors.items()
    }
    cost = count(model, *subject.task.example)
    context = choosing.context_of(model, cost)._replace(times=lambda: times)
    select = SELECTORS["energy_budget"].function

    def choose(fraction: float) -> Ranks:
        budget = {"measure": "latency", "fraction": fraction}
        return choosing.choose(select, context, budget)

    name = f"chosen for {share:g}"
    try:
        ranks = timing.fitting(share, choose, lambda one: measured({name: one})[name])
    except (SmallBudget, UserError) as error:
        print(error)
        return rows
    row = {"predicted": times.predict(ranks) / times.dense, **measured({name: ranks})}
    rows[name] = {"predicted": row["predicted"], "measured": row[name]}
    return rows


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_list("subjects", ["lenet", "vit_s4"], "What to time.")
    flags.DEFINE_integer("batch_size", 0, "Examples in a call; 0 for the subject's.", 0)
    flags.DEFINE_float("share", 0.5, "Share of the dense model's time to ask for.")
    flags.DEFINE_integer("rounds", 15, "Rounds; each variant runs once in each.", 1)
    flags.DEFINE_string("latency_table", None, "File of the layers' times.")


def _main() -> None:
    given, every = flags.FLAGS, {}
    for name in given.subjects:
        subject = subjects.make(name, given.batch_size)
        rows = measure(subject, given.share, given.rounds, given.latency_table)
        every[name] = rows
        cells = [
            [what, row["predicted"], row["measured"]]
            + [f"{row['predicted'] / row['measured'] - 1:+.0%}"]
            for what, row in rows.items()
        ]
        size = len(next(iter(subject.batch.values())))
        headers = ["model", "predicted", "measured", "off by"]
        report.show(f"{name}, batch {size}, shares of dense", headers, cells)
    logs.emit(every)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
