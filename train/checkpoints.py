"""Cutting a checkpoint to the ranks that a selector chooses."""

import functools
from collections.abc import Callable, Mapping, Sequence
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
from lowrank_jax.forms import Factors
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import curves, selectors
from train import context, selecting
from train.model import (
    abstract_checkpoint_model,
    checkpoint_task,
    family_of,
    model_cost,
)
from train.opening import first_whole
from train.report import logs
from train.run import Run, open_checkpoint_run


def truncate_checkpoint(
    path: str | Path,
    output: str | Path,
    selector: Mapping[str, Any],
    *,
    form: str = Factors.form,
    recalibration_batches: int = 0,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a checkpoint cut to selected ranks; returns its figures.

    Everything is checked before the first array is read. Only the columns that are kept
    are read (all of them where the selector looks at the weights).

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir; a damaged checkpoint is
        named, and the one before it is cut.
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
    selector = selecting.complete(selector)
    with errors.at("--checkpoint"):
        steps = checkpoint.complete_steps(path) or [Path(path)]

    def cut(step: Path) -> dict[str, Any]:
        return _cut(
            step, output, selector, form, recalibration_batches, data_dir, allowed
        )

    return first_whole(steps, cut)


def _cut(
    step: Path,
    output: str | Path,
    selector: Mapping[str, Any],
    form: str,
    recalibration_batches: int,
    data_dir: str | None,
    allowed: Sequence[str],
) -> dict[str, Any]:
    """Cuts one checkpoint; the arguments are those of `truncate_checkpoint`."""
    with errors.at("--checkpoint"):
        saved = checkpoint.open_checkpoint(step)
        abstract = abstract_checkpoint_model(saved, allow_imports=allowed)
    task = checkpoint_task(saved, allow_imports=allowed)
    cost = model_cost(abstract, task)
    before = saved.metadata["ranks"]
    open_run = functools.cache(
        functools.partial(
            open_checkpoint_run, saved, data_dir=data_dir, allow_imports=allowed
        )
    )
    if recalibration_batches:
        open_run()  # data that are not there are missed before anything is read
    ranks = selecting.select(selector, _about(saved, abstract, cost, open_run))
    model = checkpoint.load(saved, abstract, ranks={**before, **ranks})
    if form != Factors.form:
        model = surgery.truncate(model, {}, form=form)
    if recalibration_batches:
        model = _recalibrated(open_run(), model, recalibration_batches)
    after = active.get_ranks(model)
    metadata = {key: saved.metadata[key] for key in ("config", "facts")}
    forms = {path: f.form for path, f in paths.find_factors(model).items()}
    metadata["truncated"] = {"selector": selector, "forms": forms, "from": before}
    checkpoint.save(output, model, step=saved.step, metadata=metadata)
    after_cost = model_cost(model, task)
    _print_table(cost, before, after_cost, after)
    return {
        "output": str(output),
        "params": after_cost.params(after),
        "macs": after_cost.macs(after),
        "ranks": after,
    }


def _about(
    saved: checkpoint.Saved,
    abstract: nnx.Module,
    cost: counting.ModelCost,
    open_run: Callable[[], Run],
) -> selectors.Context:
    """What a selector may look at; the weights and the data are read when it does."""

    @functools.cache
    def whole() -> nnx.Module:
        return checkpoint.load(saved, abstract)

    @functools.cache
    def scorer() -> selectors.Score:
        run = open_run()
        return context.make_score(run.placement.put_model(whole()), run)

    return selectors.Context(
        saved.metadata["ranks"],
        cost,
        lambda: curves.column_importances(paths.find_factors(whole())),
        lambda: curves.singular_values(paths.find_factors(whole())),
        lambda candidates: scorer()(candidates),
        paths.find_aliases(abstract),
        family_of(saved),
    )


def _recalibrated(run: Run, model: nnx.Module, batches: int) -> nnx.Module:
    return calibration.recalibrate_batch_norm(
        run.placement.put_model(model),
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
