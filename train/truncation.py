"""Cutting a checkpoint to selected ranks: what `train.truncate` does."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lowrank_jax import calibration, checkpoint, counting, surgery
from lowrank_jax.selection import curves, solvers
from train import evaluation, input_pipeline, logs, state, steps

SELECTORS = ("rank", "rank_fraction", "ranks", "energy", "params_fraction")


def select_ranks(
    selector: str,
    value: Any,
    saved: checkpoint.Saved,
    abstract: nnx.Module,
    cost: counting.ModelCost,
) -> dict[str, Any]:
    """Ranks for a checkpoint by one of `SELECTORS`.

    Args:
      selector: Its name.
      value: Its value: a number, or for "ranks" the path of a JSON file.
      saved: The checkpoint.
      abstract: Its model without arrays.
      cost: Its cost.
    """
    current = saved.metadata["ranks"]
    try:
        if selector == "rank":
            return solvers.at_most(current, value)
        if selector == "rank_fraction":
            return solvers.at_fraction(current, value)
        if selector == "ranks":
            return read_rank_file(value)
        if selector == "params_fraction":
            return solvers.by_params_fraction(cost.layers, current, value)
        model = checkpoint.load(saved, abstract)  # energy needs the weights
        importances = curves.column_importances(surgery.find_factors(model))
        return solvers.by_energy(importances, value)
    except ValueError as error:
        raise ValueError(f"--{selector}: {error}") from error


def read_rank_file(path: str | Path) -> dict[str, Any]:
    """Ranks by path from a JSON file.

    Raises:
      ValueError: It is not there or not a JSON object.
    """
    try:
        ranks = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"must be a JSON file of {{path: rank}}, got {path} ({error})."
        ) from error
    if not isinstance(ranks, dict):
        raise ValueError(f"must be a JSON object of {{path: rank}}, got {ranks!r}.")
    return ranks


def truncate_checkpoint(
    path: str | Path,
    output: str | Path,
    selector: str,
    value: Any,
    *,
    recalibration_batches: int = 0,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a checkpoint cut to selected ranks; returns its figures.

    Everything is checked before the first array is read. Only the columns that are kept
    are read (all of them for "energy").

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      output: New folder.
      selector: One of `SELECTORS`.
      value: Its value.
      recalibration_batches: Training batches to re-estimate BatchNorm on; 0 for none.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    checkpoint.check_new_folder(output, flag="--output")
    saved = checkpoint.open_checkpoint(path, flag="--checkpoint")
    abstract = state.abstract_checkpoint_model(saved, allow_imports=list(allow_imports))
    cost = state.model_cost(abstract, saved.metadata["inputs"]["image_shape"])
    before = saved.metadata["ranks"]
    ranks = select_ranks(selector, value, saved, abstract, cost)
    batches = None
    if recalibration_batches:
        config = evaluation.config_of(saved, data_dir)
        batches = _training_batches(config, recalibration_batches, list(allow_imports))
    model = checkpoint.load(saved, abstract, ranks={**before, **ranks})
    if batches is not None:
        model = calibration.recalibrate_batch_norm(model, batches)
    after = surgery.get_ranks(model)
    metadata = {key: saved.metadata[key] for key in ("config", "inputs")}
    value = str(value) if isinstance(value, Path) else value
    metadata["truncated"] = {"selector": selector, "value": value, "from": before}
    checkpoint.save(output, model, step=saved.step, metadata=metadata)
    _print_table(cost, before, after)
    return {
        "output": str(output),
        "params": cost.params(after),
        "macs": cost.macs(after),
        "ranks": after,
    }


def _training_batches(config: dict[str, Any], count: int, allow_imports: list[str]):
    data = input_pipeline.load_data(config["data"], allow_imports=allow_imports)
    prepare = steps.normalize(config["data"]["mean"], config["data"]["std"])
    batches = data.train_batches(config["data"]["batch_size"], seed=config["seed"])
    return (prepare(batch["image"]) for batch in itertools.islice(batches, count))


def _print_table(
    cost: counting.ModelCost, before: surgery.Ranks, after: surgery.Ranks
) -> None:
    rows = []
    for path, layer in cost.layers.items():
        old, new = before[path], after[path]
        rows.append(
            [path, str(old), str(new), layer.params(old), layer.params(new)]
            + [layer.macs(old), layer.macs(new)]
        )
    total = ["all layers", "", "", cost.params(before), cost.params(after)]
    rows.append([*total, cost.macs(before), cost.macs(after)])
    headers = ["path", "rank", "cut to", "params", "cut to", "MACs", "cut to"]
    print(logs.table(headers, rows))
