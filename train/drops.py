"""The least budget at which a selector's model is still about as good."""

from collections.abc import Mapping
from typing import Any

from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import Ranks
from train import opening, selecting
from train.source import Source
from train.state import split_model

GRID = 64
"""Budgets are searched as multiples of one over it."""


def check_drop(source: Source, drop: float) -> None:
    """Refuses a drop that cannot be measured, before an array is read.

    Raises:
      UserError: It is not positive, or there are no examples to judge on.
    """
    if not 0 < drop < float("inf"):
        raise UserError(
            f"--max_drop: must be positive, got {drop}. Give a difference of the task's"
            f" {source.task.headline}."
        )
    if not source.run.holds_out:
        raise UserError(
            "--max_drop: needs examples held out of training, got"
            " config.data.validation_examples 0. Give a budget instead."
        )


def least_budget(
    source: Source,
    selector: Mapping[str, Any],
    drop: float,
    *,
    recalibration_batches: int = 0,
) -> tuple[float, Ranks, dict[str, float]]:
    """Bisects the budgets of a selector for the least whose model is not much worse.

    It takes for granted that a larger budget is no worse; what it returns has been
    judged.

    Args:
      source: The checkpoint.
      selector: Name and arguments, but for its `fraction`.
      drop: How much worse the task's headline figure may be, on the held-out examples.
      recalibration_batches: Training batches to re-estimate BatchNorm on each time.

    Returns:
      The budget, its ranks, and the figure "before" and "after".

    Raises:
      UserError: Every budget is worse.
    """
    opened = opening.Opened(source.run, source.whole)
    evaluator = opened.evaluator("validation", recalibration_batches, translate=False)
    _, params, model_state = split_model(source.whole)
    name, sign = source.task.headline, 1 if source.task.higher_is_better else -1

    def judged(ranks: Ranks) -> float:
        return evaluator.at(params, model_state, ranks)[name]

    before = judged(source.ranks)
    print(f"{name} {before:.4g} at all ranks", flush=True)
    best: tuple[float, Ranks, dict[str, float]] | None = None
    low, high = 0, GRID + 1
    while high - low > 1:
        middle = (low + high) // 2
        fraction = middle / GRID
        ranks = _chosen(source, selector, fraction)
        after = None if ranks is None else judged(ranks)
        if after is not None and sign * (before - after) <= drop + 1e-9:
            high, best = middle, (fraction, ranks, {"before": before, "after": after})
        else:
            low = middle
        reached = "no ranks fit" if after is None else f"{name} {after:.4g}"
        print(f"{reached} at {fraction:.3f} of the cost", flush=True)
    if best is None:
        raise UserError(
            f"--max_drop: must be met by some budget, got {drop}, and none keeps"
            f" {name} so near {before:.4g}. Raise it."
        )
    return best


def _chosen(
    source: Source, selector: Mapping[str, Any], fraction: float
) -> Ranks | None:
    """The selector's ranks, None where the budget is below what rank 1 costs."""
    args = {**selector["args"], "fraction": fraction}
    try:
        return selecting.select({**selector, "args": args}, source.context())
    except SmallBudget:
        return None
