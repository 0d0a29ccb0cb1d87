"""What actions may ask about a model: in the run, and before its first step."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from lowrank_jax import active, calibration, factorization, paths, selection
from lowrank_jax.selection import tails
from train import scoring, selecting
from train.actions import Context
from train.phases import Phase, Selected
from train.run import Run
from train.until import stable_ranks


def in_run(
    run: Run,
    initial_stable_ranks: Mapping[str, Any] | None,
    selected: Selected,
) -> Context:
    """Answers from the model's values and the data.

    Args:
      run: What it is about; a search scores on its validation split.
      initial_stable_ranks: As in `Context`.
      selected: In earlier phases, and before.
    """

    def select(model: nnx.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
        score = measure = None
        if run.holds_out:
            score = scoring.make_score(model, run)
            measure = functools.partial(scoring.output_losses, model, run)
        context = selection.context_of(
            model,
            run.cost(model),
            score=score,
            family=selected.family or (),
            activations=measure,
        )
        return selecting.select(spec, context)

    def batch_statistics(model: nnx.Module, batches: int) -> nnx.State:
        examples = run.training_batches(batches)
        calibrated = calibration.recalibrate_batch_norm(
            model, examples, lambda model, batch: model(*run.task.inputs(batch, None))
        )
        return nnx.state(calibrated, nnx.BatchStat)

    return Context(
        run.cost,
        select,
        stable_ranks,
        batch_statistics,
        initial_stable_ranks,
        selected.target_ranks,
    )


def initial_stable_ranks(
    run: Run, phases: Sequence[Phase], model: nnx.Module
) -> dict[str, Any] | None:
    """Measures the stable ranks that Cuttlefish's rule compares with, if it is asked.

    They are those of a fresh model, which with `init_from` is not the run's own.
    """
    names = [name for phase in phases for name, _ in phase.on_end]
    if "factorize_at_stable_rank" not in names:
        return None
    return stable_ranks(run.fresh_model() if run.config["init_from"] else model)


def before_run(run: Run, selected: Selected) -> Context:
    """Answers what can be known of an abstract model: shapes, and no more.

    Every column counts as much as every other, every choice scores the same, and the
    stable ranks are those of a fresh model, so that nothing is found to be smaller than
    it may turn out to be.

    Args:
      run: What it is about.
      selected: In earlier phases, and before, as it could be known.
    """

    def importances(model: nnx.Module) -> dict[str, Any]:
        return {
            path: np.ones((*limits.stack, limits.allocated))
            for path, limits in active.rank_limits(model).items()
        }

    def select(model: nnx.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
        ranks = {path: at.active for path, at in active.rank_limits(model).items()}
        context = selection.Context(
            ranks,
            run.cost(model),
            functools.partial(importances, model),
            functools.partial(importances, model),
            (lambda candidates: [0.0] * len(candidates)) if run.holds_out else None,
            paths.find_aliases(model),
            selected.family or (),
            activations=(lambda: tails.list_errors(importances(model), ranks))
            if run.holds_out
            else None,
        )
        return selecting.select(spec, context)

    def ones(model: nnx.Module) -> dict[str, Any]:
        matrices = nnx.eval_shape(factorization.kernel_matrices, model)
        return {path: np.ones(m.shape[:-2]) for path, m in matrices.items()}

    return Context(
        run.cost,
        select,
        ones,
        lambda model, batches: nnx.state(model, nnx.BatchStat),
        _Ones(),
        selected.target_ranks,
    )


class _Ones(dict):
    """A stable rank of 1 for every layer."""

    def __missing__(self, path: str) -> float:
        return 1.0
