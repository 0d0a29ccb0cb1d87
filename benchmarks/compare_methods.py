"""All methods on one network and data set, each trained once and cut at several sizes.

`python -m benchmarks.compare_methods --workdir=runs/compare`: LeNet on MNIST, the
configs' own recipes, as many epochs for each. A trained model is cut, without further
training, at shares of the dense MACs by each of two rules (one fraction of all ranks;
one share of energy); which rule is read on the test images is decided on the held-out
training images. A model that is smaller than a budget as trained stays as it is. Ends
with a table and one line of JSON; runs that are there already are not trained again.
"""

import functools
import importlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from configs import common
from lowrank_jax import active, paths
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import budgets, curves, solvers, tails
from train import binary, evaluation, loop, opening
from train.report import logs
from train.state import split_model

METHODS = {
    "dense + SVD": ("dense", ""),
    "Maestro": ("maestro", "compare"),
    "nested": ("nested", "compare"),
    "SVD training (Hoyer)": ("svd_training", ""),
    "SVD training (L1)": ("svd_training", "l1"),
    "BSR": ("bsr", ""),
    "Cuttlefish": ("cuttlefish", ""),
    "Pufferfish": ("pufferfish", ""),
    "Khodak": ("khodak", ""),
    "LoRITa": ("lorita", ""),
    "Sequential freezing": ("sequential_freezing", ""),
}
"""Config and its argument by the name in the table; the first is the baseline."""

RATE = "train/examples_per_s"
WINDOW, WINDOWS = 20, 7
"""Steps between two logged rates, and how many of these a phase is timed for."""
BUDGETS = (0.5, 0.25, 0.125)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Which methods.")
_TIMES = flags.DEFINE_bool("times", True, "Time the steps (on an idle machine).")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")


def make_config(method: str, seed: int) -> Any:
    """Returns a method's config, without evaluation in between."""
    name, arg = METHODS[method]
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.seed = seed
    config.eval_every_epochs = 0
    config.checkpoint_every_epochs = 0
    return config


def seconds_per_step(method: str) -> float:
    """Returns the time of a training step, the phases weighed by their epochs.

    From a short run of each phase, the median of its logged rates.
    """
    config = make_config(method, seed=0)
    config.log_every_steps = WINDOW
    epochs = [phase["until"].get("epochs") for phase in config.phases]
    rest = common.LENET_EPOCHS - sum(n for n in epochs if n)
    shares = [(n or rest) / common.LENET_EPOCHS for n in epochs]
    for phase in config.phases:
        phase["until"] = {"steps": WINDOW * WINDOWS}
    with tempfile.TemporaryDirectory() as folder:
        loop.train_and_evaluate(config, Path(folder) / "run")
        lines = [json.loads(x) for x in (Path(folder) / "run/metrics.jsonl").open()]
    rates = np.array([x[RATE] for x in lines if RATE in x])
    seconds = config.data.batch_size / rates
    return sum(
        share * float(np.median(windows))
        for share, windows in zip(
            shares, np.array_split(seconds, len(shares)), strict=True
        )
    )


def frontier(workdir: Path) -> dict[str, dict[str, Any]]:
    """Returns test figures of a trained model, whole and at each budget."""
    opened = opening.open_model(workdir)
    run, model = opened
    cost, full = run.cost(model), active.get_ranks(model)

    @functools.cache
    def evaluator(split: str) -> evaluation.Evaluator:
        return opened.evaluator(split)

    def figures(ranks: Ranks, split: str) -> dict[str, Any]:
        _, params, model_state = split_model(model)
        return evaluator(split).at(params, model_state, ranks)

    candidates = {"full": [full]}
    factored = sum(layer.dense_macs for layer in cost.layers.values())
    for budget in BUDGETS:
        share = (budget * cost.dense_macs - cost.fixed_macs) / factored
        candidates[f"{budget:g}"] = _cuts(model, cost, full, share)
    rows = {}
    for size, choices in candidates.items():
        if choices:
            best = max(
                choices, key=lambda ranks: figures(ranks, "validation")["accuracy"]
            )
            rows[size] = figures(best, "test")
    return rows


def _cuts(model: Any, cost: Any, full: Ranks, share: float) -> list[Any]:
    """Rank vectors within a share of the factored layers' dense MACs; none if that is
    below rank 1."""
    if budgets.total_cost(cost.layers, full, "macs") <= share * sum(
        layer.dense_macs for layer in cost.layers.values()
    ):
        return [full]
    importances = curves.column_importances(paths.find_factors(model))
    energies = tails.list_errors(importances, full)
    try:
        return [
            solvers.by_macs_fraction(cost.layers, full, share),
            solvers.by_level(cost.layers, full, energies, share, measure="macs"),
        ]
    except UserError:
        return []


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    summary: dict[str, Any] = {}
    for size in {size: None for run in runs for size in run["rows"]}:
        rows = [run["rows"][size] for run in runs if size in run["rows"]]
        if len(rows) == len(runs):
            summary[size] = {
                key: statistics.mean(row[key] for row in rows)
                for key in ("accuracy", "params", "macs")
            }
    return summary


def _main() -> None:
    unknown = [method for method in _METHODS.value if method not in METHODS]
    if unknown:
        raise UserError(f"--methods: must be of {list(METHODS)}, got {unknown}.")
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in _METHODS.value}
    for seed in map(int, _SEEDS.value):
        for method in runs:
            workdir = Path(_WORKDIR.value) / f"{'_'.join(METHODS[method])}_{seed}"
            loop.train_and_evaluate(make_config(method, seed), workdir)
            runs[method].append({"seed": seed, "rows": frontier(workdir)})
            logs.say(f"{method}: {json.dumps(runs[method][-1])}")
    means = {method: _summary(of_method) for method, of_method in runs.items()}
    times = {method: seconds_per_step(method) for method in runs if _TIMES.value}
    baseline = times[next(iter(times))] if times else 1.0
    sizes = ["full", *(f"{budget:g}" for budget in BUDGETS)]
    rows = []
    for method, mean in means.items():
        cells = [
            f"{100 * mean[size]['accuracy']:.2f}" if size in mean else "-"
            for size in sizes
        ]
        macs = f"{mean['full']['macs'] / 1000:.0f}k"
        time = f"{times[method] / baseline:.2f}" if times else "-"
        rows.append([method, macs, *cells, time])
    print(logs.table(["method", "MACs as trained", *sizes, "step time"], rows))
    logs.emit({"runs": runs, "means": means, "seconds_per_step": times})


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    binary.run(_main)
