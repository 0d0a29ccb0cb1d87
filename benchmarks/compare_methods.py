"""All methods on one network and data set, each trained once and cut at several sizes.

`python -m benchmarks.compare_methods --workdir=runs/compare`: LeNet on MNIST, the
configs' own recipes, as many epochs for each. A trained model is cut, without further
training, at shares of the dense MACs by each of two rules (one fraction of all ranks;
one share of energy); which rule is read on the test images is decided on the held-out
training images. A model that is smaller than a budget as trained stays as it is. Ends
with a table and one line of JSON; runs that are there already are not trained again.
"""

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lowrank_jax import checkpoint, surgery
from lowrank_jax.selection import curves, solvers
from train import binary, evaluation, input_pipeline, logs, steps
from train import state as state_lib
from train import train as train_lib

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
BUDGETS = (0.5, 0.25, 0.125)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Which methods.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")


def train(method: str, seed: int, workdir: Path) -> float:
    """Trains a method, or goes on with a run of the same config; returns the seconds of
    its training steps."""
    name, arg = METHODS[method]
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.seed = seed
    config.eval_every_epochs = 0
    config.checkpoint_every_epochs = 0
    train_lib.train_and_evaluate(config, workdir)
    return _seconds(workdir)


def _seconds(workdir: Path) -> float:
    """Time of all steps by the logged rates; the windows in which something compiled or
    a search ran, three times slower than the median, count as the median."""
    config = json.loads((workdir / "config.json").read_text())
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
    rates = np.array([x[RATE] for x in lines if RATE in x])
    seconds = config["data"]["batch_size"] * config["log_every_steps"] / rates
    median = float(np.median(seconds))
    return float(np.where(seconds > 3 * median, median, seconds).sum())


def frontier(workdir: Path) -> dict[str, dict[str, Any]]:
    """Test figures of a trained model, whole and at each budget."""
    saved = checkpoint.open_checkpoint(workdir)
    model = state_lib.load_model(saved, allow_imports=None)
    config = saved.metadata["config"]
    data = input_pipeline.load_data(config["data"], allow_imports=None)
    structure, params, model_state = state_lib.split_model(model)
    normalize = steps.normalize(config["data"]["mean"], config["data"]["std"])
    evaluate = evaluation.make_evaluator(structure, normalize)
    cost = state_lib.model_cost(model, data.image_shape)
    full = surgery.get_ranks(model)

    def accuracy(ranks: surgery.Ranks, split: str) -> float:
        batches = data.eval_batches(split, config["data"]["eval_batch_size"])
        return evaluate(params, model_state, ranks, batches)["accuracy"]

    candidates = {"full": [full]}
    factored = sum(layer.dense_macs for layer in cost.layers.values())
    for budget in BUDGETS:
        share = (budget * cost.dense_macs - cost.fixed_macs) / factored
        candidates[f"{budget:g}"] = _cuts(model, cost, full, share)
    rows = {}
    for size, choices in candidates.items():
        if choices:
            best = max(choices, key=lambda ranks: accuracy(ranks, "validation"))
            results = {"accuracy": accuracy(best, "test")}
            rows[size] = evaluation.figures(results, cost, best)
    return rows


def _cuts(model: Any, cost: Any, full: surgery.Ranks, share: float) -> list[Any]:
    """Rank vectors within a share of the factored layers' dense MACs; none if that is
    below rank 1."""
    if solvers.total_cost(cost.layers, full, "macs") <= share * sum(
        layer.dense_macs for layer in cost.layers.values()
    ):
        return [full]
    importances = curves.column_importances(surgery.find_factors(model))
    try:
        return [
            solvers.by_macs_fraction(cost.layers, full, share),
            solvers.by_energy_budget(cost.layers, importances, share, measure="macs"),
        ]
    except ValueError:
        return []


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    sizes = {size: None for run in runs for size in run["rows"]}
    summary = {"relative_time": statistics.mean(r["relative_time"] for r in runs)}
    for size in sizes:
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
        raise ValueError(f"--methods: must be of {list(METHODS)}, got {unknown}.")
    baseline = next(iter(METHODS))
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, _SEEDS.value):
        baseline_seconds = None
        for method in dict.fromkeys([baseline, *_METHODS.value]):
            workdir = Path(_WORKDIR.value) / f"{'_'.join(METHODS[method])}_{seed}"
            seconds = train(method, seed, workdir)
            baseline_seconds = baseline_seconds or seconds
            run = {"seed": seed, "rows": frontier(workdir)}
            run["relative_time"] = seconds / baseline_seconds
            runs.setdefault(method, []).append(run)
            logs.say(f"{method}, seed {seed}: {json.dumps(run)}")
    means = {method: _summary(of_method) for method, of_method in runs.items()}
    sizes = ["full", *(f"{budget:g}" for budget in BUDGETS)]
    rows = []
    for method, mean in means.items():
        cells = [
            f"{100 * mean[s]['accuracy']:.2f}" if s in mean else "-" for s in sizes
        ]
        macs = f"{mean['full']['macs'] / 1000:.0f}k"
        rows.append([method, macs, *cells, f"{mean['relative_time']:.2f}"])
    print(logs.table(["method", "MACs as trained", *sizes, "time"], rows))
    logs.emit({"runs": runs, "means": means})


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    binary.run(_main)
