"""How good a model is at any ranks; one compilation for all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lowrank_jax import active, calibration, counting, families
from lowrank_jax.families import Family
from lowrank_jax.ranks import Limits, Ranks, check_lower
from train.run import Batches
from train.state import Structure, model_state_of
from train.stopping import NotFinite
from train.tasks.base import Task

Figures = dict[str, Any]
"""The task's figures as every binary prints them, with "params" (each layer in the
smaller of its forms), "stored" (parameters in a checkpoint), "macs" and "ranks"."""

Evaluate = Callable[[Any, Any, Ranks, Batches], dict[str, float]]
"""From parameters, model state, ranks and batches to the task's figures."""

Calibrate = Callable[[Any, Any, Ranks], Any]
"""From parameters, model state and ranks to the model state for these ranks."""

Score = Callable[[Any, Any, Ranks], dict[str, float]]
"""From parameters, model state and ranks to figures of what the model writes."""


def make_sums(
    structure: Structure, task: Task, *, batch_statistics: bool = False
) -> Callable[..., dict[str, Array]]:
    """Makes the jitted function from arrays, ranks and a batch to the task's sums.

    Ranks are traced: evaluating at others does not recompile.

    Args:
      structure: The model's structure.
      task: What is judged.
      batch_statistics: Normalize by each batch's own statistics, where running ones of
        other ranks would be wrong.
    """

    @jax.jit
    def sums(params: Any, model_state: Any, ranks: Any, batch: Mapping[str, Array]):
        model = structure.merge(params, model_state, None)
        if batch_statistics:
            calibration.use_batch_statistics(model)
        active.set_ranks(model, ranks)
        return task.sums(model(*task.inputs(batch, None)), batch)

    return sums


def make_evaluator(
    structure: Structure, task: Task, *, batch_statistics: bool = False
) -> Evaluate:
    """Makes a function from parameters, model state, ranks and batches to figures.

    Batches may be padded; their `weight` says which examples count.

    Args:
      structure: As of `make_sums`.
      task: As of `make_sums`.
      batch_statistics: As of `make_sums`.
    """
    sums = make_sums(structure, task, batch_statistics=batch_statistics)

    def evaluate(
        params: Any, model_state: Any, ranks: Ranks, batches: Batches
    ) -> dict[str, float]:
        arrays, total = settable(structure, ranks), None
        for batch in batches:
            more = sums(params, model_state, arrays, batch)
            total = more if total is None else jax.tree.map(jnp.add, total, more)
        return task.figures({name: float(value) for name, value in total.items()})

    return evaluate


def make_calibrator(
    structure: Structure, task: Task, batches: Callable[[], Batches]
) -> Calibrate:
    """Makes a function from parameters, model state and ranks to a state for these.

    BatchNorm's running statistics become the average over the batches at these ranks,
    so that every nested model has its own (Horvath et al., 2021); one compilation for
    all ranks.
    """

    @jax.jit
    def update(model_state: Any, count: Any, params: Any, ranks: Any, batch: Any):
        model = structure.merge(params, model_state, None)
        active.set_ranks(model, ranks)
        average = calibration.batch_norm_average(
            model, count, lambda model: model(*task.inputs(batch, None))
        )
        nnx.update(model, average)
        return model_state_of(model)

    def calibrate(params: Any, model_state: Any, ranks: Ranks) -> Any:
        arrays = settable(structure, ranks)
        for number, batch in enumerate(batches(), 1):
            model_state = update(model_state, np.float32(number), params, arrays, batch)
        return model_state

    return calibrate


class Evaluator(NamedTuple):
    """What judges a model at any ranks.

    Args:
      evaluate: Of `make_evaluator`.
      calibrate: Of `make_calibrator`, to judge each size with statistics of its own;
        None to judge all with those that are there.
      cost: What the model costs.
      batches: Makes the batches to evaluate on.
      limits: What bounds the ranks of the model.
      score: Further figures, of what the model writes; None for none.
    """

    evaluate: Evaluate
    calibrate: Calibrate | None
    cost: counting.ModelCost
    batches: Callable[[], Batches]
    limits: Mapping[str, Limits]
    score: Score | None = None

    def at(self, params: Any, model_state: Any, ranks: Ranks) -> Figures:
        """Returns the figures of a model at these ranks, with what it costs when it is
        cut to them."""
        if self.calibrate is not None:
            model_state = self.calibrate(params, model_state, ranks)
        results = self.evaluate(params, model_state, ranks, self.batches())
        if self.score is not None:
            results |= self.score(params, model_state, ranks)
        return {
            **results,
            "params": self.cost.params(ranks),
            "stored": self.cost.stored(ranks),
            "macs": self.cost.macs(ranks),
            "ranks": dict(ranks),
        }


def sweep(
    evaluator: Evaluator,
    params: Any,
    model_state: Any,
    ranks: Ranks,
    fractions: Sequence[float],
    family: Family = (),
) -> list[Figures]:
    """Returns the frontier: figures at each of some sizes of the model.

    Args:
      evaluator: What judges.
      params: The parameters.
      model_state: Everything else of the model, such as BatchNorm's statistics.
      ranks: The active ranks.
      fractions: The sizes: fractions of them, in (0, 1].
      family: What the fractions stand for where it is not empty.
    """
    levels = [families.member(family, ranks, fraction) for fraction in fractions]
    for lower in levels:  # all of them, before the first is evaluated
        check_lower(lower, evaluator.limits)
    rows: list[Figures] = []
    for fraction, lower in zip(fractions, levels, strict=True):
        if rows and rows[-1]["ranks"] == lower:  # a dense model: all are the same
            rows.append({**rows[-1], "rank_fraction": fraction})
            continue
        row = evaluator.at(params, model_state, lower)
        rows.append({"rank_fraction": fraction, **row})
    return rows


def check_finite(rows: Sequence[Figures], split: str) -> None:
    """Refuses figures of a model that computes no numbers any more.

    Args:
      rows: Figures of one checkpoint, at one or several ranks.
      split: The examples that they are of.

    Raises:
      NotFinite: A loss is NaN or infinite.
    """
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise NotFinite(
                f"loss on the {split} split: must be finite, got {row['loss']} at"
                f" ranks {row['ranks']}. The run has diverged, or the data hold"
                " values that are not finite; evaluate an earlier checkpoint."
            )


def settable(structure: Structure, ranks: Ranks) -> dict[str, np.ndarray]:
    """Returns ranks as arrays, checked; a form that has one rank only is left out."""
    check_lower(ranks, structure.limits)
    return {
        path: np.asarray(rank, np.int32)  # the same in every process
        for path, rank in ranks.items()
        if structure.limits[path].nested
    }
