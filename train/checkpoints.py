"""Cutting a checkpoint to selected ranks: what `train.truncate` does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lowrank_jax import calibration, checkpoint, counting
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import curves
from train import evaluation, selectors, step
from train.data import pipeline
from train.report import logs
from train.state import abstract_checkpoint_model, model_cost

FLAGS = ("rank", "rank_fraction", "ranks", "energy", "params_fraction", "macs_fraction")
"""The selectors that have a flag of `train.truncate`; each takes one value."""


def select_ranks(
    selector: str,
    value: Any,
    saved: checkpoint.Saved,
    abstract: nnx.Module,
    cost: counting.ModelCost,
) -> dict[str, Any]:
    """Ranks for a checkpoint by one of `FLAGS`.

    Args:
      selector: Its name.
      value: Its value: a number, or for "ranks" the path of a JSON file.
      saved: The checkpoint.
      abstract: Its model without arrays.
      cost: Its cost.
    """

    def importances() -> Any:
        model = checkpoint.load(saved, abstract)
        return curves.column_importances(find_factors(model))

    context = selectors.Context(saved.metadata["ranks"], cost, importances, None)
    try:
        value = read_rank_file(value) if selector == "ranks" else value
        return selectors.SELECTORS[selector](context, value=value)
    except ValueError as error:
        raise UserError(f"--{selector}: {error}") from error


def read_rank_file(path: str | Path) -> dict[str, Any]:
    """Ranks by path from a JSON file.

    Raises:
      ValueError: It is not there or not a JSON object.
    """
    try:
        ranks = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"must be a JSON file of {{path: rank}}, got {path} ({error})."
        ) from error
    if not isinstance(ranks, dict):
        raise UserError(f"must be a JSON object of {{path: rank}}, got {ranks!r}.")
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
      selector: One of `FLAGS`.
      value: Its value.
      recalibration_batches: Training batches to re-estimate BatchNorm on; 0 for none.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    checkpoint.check_new_folder(output, flag="--output")
    saved = checkpoint.open_checkpoint(path, flag="--checkpoint")
    abstract = abstract_checkpoint_model(saved, allow_imports=list(allow_imports))
    cost = model_cost(abstract, saved.metadata["inputs"]["image_shape"])
    before = saved.metadata["ranks"]
    ranks = select_ranks(selector, value, saved, abstract, cost)
    batches = None
    if recalibration_batches:
        config = evaluation.config_of(saved, data_dir)
        batches = _training_batches(config, recalibration_batches, list(allow_imports))
    model = checkpoint.load(saved, abstract, ranks={**before, **ranks})
    if batches is not None:
        model = calibration.recalibrate_batch_norm(model, batches)
    after = get_ranks(model)
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
    data = pipeline.load_data(config["data"], allow_imports=allow_imports)
    prepare = step.normalize(config["data"]["mean"], config["data"]["std"])
    batches = evaluation.training_batches(data, config, count)
    return (prepare(batch["image"]) for batch in batches)


def _print_table(cost: counting.ModelCost, before: Ranks, after: Ranks) -> None:
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
