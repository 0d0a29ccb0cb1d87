"""Rank selectors against each other: one trained model, many budgets.

`python -m benchmarks.selectors --checkpoint=runs/nested --plot=selectors.png`: each
selector chooses the ranks of a run's last model within shares of the dense MACs; those
that look at the loss do so on held-out training data, and what was chosen is judged on
the test split. A dense checkpoint is factorized first. Selectors are named with their
arguments, as `knapsack:curve=loss`. Ends with one line of JSON.
"""

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import report
from lowrank_jax import checkpoint, errors
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import Ranks
from train import binary, opening, selecting
from train.report import logs, plots
from train.source import Source
from train.state import split_model

SELECTORS = (
    "macs_fraction",
    "energy_budget",
    "minimax",
    "welore",
    "lc",
    "knapsack",
    "knapsack:curve=activations",
    "knapsack:curve=loss",
    "greedy:steps=20",
    "beam:steps=20,width=4",
    "swaps",
)
BUDGETS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.125)


def read(text: str) -> dict[str, Any]:
    """Reads a selector and its arguments.

    >>> read("beam:steps=20,width=4")
    {'name': 'beam', 'args': {'steps': 20, 'width': 4}}
    """
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if wrong := [key for key, _, value in pairs if not value]:
        raise UserError(
            f"--selector: must be NAME:key=value,..., got {text!r} without a value of"
            f" {wrong}. Complete it."
        )
    return {"name": name, "args": {key: _plain(value) for key, _, value in pairs}}


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def choose(source: Source, text: str, budget: float) -> Ranks | None:
    """Returns the ranks within a share of the factored layers' dense MACs, None where
    rank 1 everywhere is over it."""
    spec = read(text)
    more = {"measure": "macs", "fraction": budget}
    spec["args"] |= {"value": budget} if spec["name"] == "macs_fraction" else more
    try:
        return selecting.select(selecting.complete(spec), source.context())
    except SmallBudget:
        return None


def measure(
    source: Source,
    selectors: Sequence[str],
    budgets: Sequence[float],
    recalibration_batches: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Returns rows by selector: the figures at each budget, and the seconds it took to
    choose."""
    opened = opening.Opened(source.run, source.whole)
    evaluator = opened.evaluator("test", recalibration_batches, translate=False)
    _, params, model_state = split_model(source.whole)
    known: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for name in selectors:
        found[name] = []
        for budget in budgets:
            began = time.perf_counter()
            ranks = choose(source, name, budget)
            if ranks is None:
                continue
            seconds = time.perf_counter() - began
            key = str(sorted(ranks.items()))
            if key not in known:
                known[key] = evaluator.at(params, model_state, ranks)
            found[name].append({**known[key], "budget": budget, "seconds": seconds})
            print(f"{name} at {budget:g}: {seconds:.1f} s", flush=True)
    return found


def table(
    found: Mapping[str, Sequence[Mapping[str, Any]]], figure: str
) -> list[list[Any]]:
    """Returns a row for each selector: the figure at each budget, and the median of the
    seconds."""
    budgets = sorted({row["budget"] for rows in found.values() for row in rows})[::-1]
    cells = []
    for name, rows in found.items():
        at = {row["budget"]: row[figure] for row in rows}
        seconds = statistics.median(row["seconds"] for row in rows) if rows else ""
        cells.append([name, *(at.get(budget, "") for budget in budgets), seconds])
    return [["selector", *(f"{budget:g}" for budget in budgets), "s"], *cells]


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or a checkpoint.")
    flags.DEFINE_list("budgets", [str(b) for b in BUDGETS], "Shares of the dense MACs.")
    flags.DEFINE_multi_string("selector", list(SELECTORS), "With its arguments.")
    flags.DEFINE_integer(
        "recalibration_batches", 0, "To re-estimate BatchNorm on at each.", 0
    )
    flags.DEFINE_integer(
        "scoring_batches", 4, "Of validation examples, for what looks at the loss.", 1
    )
    flags.DEFINE_string("plot", "", "A picture of the task's headline figure.")
    flags.DEFINE_list("allow_imports", [], "Packages that names may be imported from.")
    flags.mark_flag_as_required("checkpoint")


def _main() -> None:
    given = flags.FLAGS
    if given.plot:
        with errors.at("--plot"):
            plots.check_suffix(given.plot)
    step = checkpoint.open_checkpoint(given.checkpoint).path
    source = Source(Path(step), None, given.allow_imports)
    source.run.config["scoring_batches"] = given.scoring_batches
    budgets = selecting.numbers(given.budgets, "--budgets")
    found = measure(source, given.selector, budgets, given.recalibration_batches)
    task = source.run.task
    about = f"{Path(given.checkpoint).name}, {source.run.data.name}, test split"
    for figure in dict.fromkeys((task.headline, "loss")):
        headers, *cells = table(found, figure)
        report.show(f"{figure} at shares of the dense MACs, {about}", headers, cells)
    if given.plot:
        plots.plot_frontier(
            found,
            given.plot,
            headline=task.headline,
            higher_is_better=task.higher_is_better,
            unit=task.unit,
            costs=("macs",),
        )
    logs.emit(found)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
