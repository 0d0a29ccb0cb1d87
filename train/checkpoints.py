"""What can be done with a checkpoint: evaluate it, sweep its ranks, cut it."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lowrank_jax import (
    active,
    calibration,
    checkpoint,
    counting,
    errors,
    paths,
    surgery,
)
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import curves, selectors
from train import context, evaluation, selecting
from train import model as models
from train.report import logs
from train.run import Run, open_checkpoint_run
from train.state import split_model


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str = "test",
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> evaluation.Figures:
    """Returns the figures of a checkpoint at its ranks.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      split: "train", "validation" or "test".
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    run, model = _open(path, data_dir, allow_imports)
    evaluator = _evaluator(run, model, split, recalibration_batches=0)
    _, params, model_state = split_model(model)
    return evaluator.at(params, model_state, active.get_ranks(model))


def sweep_checkpoint(
    path: str | Path,
    fractions: Sequence[float],
    *,
    split: str = "test",
    recalibration_batches: int = 0,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> list[evaluation.Figures]:
    """Returns the figures of a checkpoint at each of some fractions of its ranks.

    Args:
      path: As of `evaluate_checkpoint`.
      fractions: Fractions of the ranks in (0, 1].
      split: As of `evaluate_checkpoint`.
      recalibration_batches: Training batches to re-estimate BatchNorm on at each
        fraction; 0 for the statistics of the checkpoint.
      data_dir: As of `evaluate_checkpoint`.
      allow_imports: As of `evaluate_checkpoint`.
    """
    run, model = _open(path, data_dir, allow_imports)
    evaluator = _evaluator(run, model, split, recalibration_batches)
    _, params, model_state = split_model(model)
    ranks = active.get_ranks(model)
    return evaluation.sweep(evaluator, params, model_state, ranks, fractions)


def truncate_checkpoint(
    path: str | Path,
    output: str | Path,
    selector: Mapping[str, Any],
    *,
    form: str = "factored",
    recalibration_batches: int = 0,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a checkpoint cut to selected ranks; returns its figures.

    Everything is checked before the first array is read. Only the columns that are kept
    are read (all of them where the selector looks at the weights).

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      output: New folder.
      selector: Name and arguments of a selector.
      form: The form of the cut layers, a key of `lowrank_jax.forms.FORMS`.
      recalibration_batches: Training batches to re-estimate BatchNorm on; 0 for none.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    allowed = list(allow_imports)
    with errors.at("--output"):
        checkpoint.check_new_folder(output)
    with errors.at("--checkpoint"):
        saved = checkpoint.open_checkpoint(path)
        abstract = models.abstract_checkpoint_model(saved, allow_imports=allowed)
    task = models.checkpoint_task(saved, allow_imports=allowed)
    cost = models.model_cost(abstract, task)
    before = saved.metadata["ranks"]

    @functools.cache
    def run() -> Run:
        return open_checkpoint_run(saved, data_dir=data_dir, allow_imports=allowed)

    @functools.cache
    def whole() -> nnx.Module:
        return checkpoint.load(saved, abstract)

    @functools.cache
    def scorer() -> selectors.Score:
        return context.make_score(whole(), run())

    if recalibration_batches:
        run()  # data that are not there are missed before anything is read
    about = selectors.Context(
        before,
        cost,
        lambda: curves.column_importances(paths.find_factors(whole())),
        lambda candidates: scorer()(candidates),
        paths.find_aliases(abstract),
    )
    ranks = selecting.select(selector, about)
    model = checkpoint.load(saved, abstract, ranks={**before, **ranks})
    if form != "factored":
        model = surgery.truncate(model, {}, form=form)
    if recalibration_batches:
        model = _recalibrated(run(), model, recalibration_batches)
    after = active.get_ranks(model)
    metadata = {key: saved.metadata[key] for key in ("config", "facts")}
    metadata["truncated"] = {"selector": dict(selector), "form": form, "from": before}
    checkpoint.save(output, model, step=saved.step, metadata=metadata)
    after_cost = models.model_cost(model, task)
    _print_table(cost, before, after_cost, after)
    return {
        "output": str(output),
        "params": after_cost.params(after),
        "macs": after_cost.macs(after),
        "ranks": after,
    }


def _open(
    path: str | Path, data_dir: str | None, allow_imports: Sequence[str]
) -> tuple[Run, nnx.Module]:
    """A checkpoint's run and its model."""
    with errors.at("--checkpoint"):
        saved = checkpoint.open_checkpoint(path)
        model = models.load_model(saved, allow_imports=list(allow_imports))
    run = open_checkpoint_run(
        saved, data_dir=data_dir, allow_imports=list(allow_imports)
    )
    return run, model


def _evaluator(
    run: Run, model: nnx.Module, split: str, recalibration_batches: int
) -> evaluation.Evaluator:
    structure, _, _ = split_model(model)
    calibrate = None
    if recalibration_batches and calibration.has_batch_norm(model):
        calibrate = evaluation.make_calibrator(
            structure, run.task, lambda: run.training_batches(recalibration_batches)
        )
    return evaluation.Evaluator(
        evaluation.make_evaluator(structure, run.task),
        calibrate,
        run.cost(model),
        lambda: run.eval_batches(split),
    )


def _recalibrated(run: Run, model: nnx.Module, batches: int) -> nnx.Module:
    return calibration.recalibrate_batch_norm(
        model,
        run.training_batches(batches),
        lambda model, batch: model(*run.task.inputs(batch, None)),
    )


def _print_table(
    cost: counting.ModelCost,
    before: Ranks,
    after_cost: counting.ModelCost,
    after: Ranks,
) -> None:
    rows = []
    for path, layer in cost.layers.items():
        cut, old, new = after_cost.layers[path], before[path], after[path]
        rows.append(
            [path, str(old), str(new), layer.params(old), cut.params(new)]
            + [layer.macs(old), cut.macs(new)]
        )
    total = ["all layers", "", "", cost.params(before), after_cost.params(after)]
    rows.append([*total, cost.macs(before), after_cost.macs(after)])
    headers = ["path", "rank", "cut to", "params", "cut to", "MACs", "cut to"]
    print(logs.table(headers, rows))
