"""Budgets: a share of what the factored layers cost when dense, and what they cost.

A cost is a `LayerCost`, in "params" or "macs", or a `LayerTimes`, in "latency".
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import Ranks, at_most
from lowrank_jax.times import LayerTimes

Costs: TypeAlias = Mapping[str, LayerCost] | Mapping[str, LayerTimes]
"""What each layer costs at a rank, by path."""


def total_cost(costs: Costs, ranks: Ranks, measure: str) -> float:
    """Sums what layers cost at these ranks, in "params", "macs" or "latency"."""
    return sum(getattr(costs[path], measure)(rank) for path, rank in ranks.items())


def check_budget(
    costs: Costs,
    max_ranks: Ranks,
    fraction: float,
    measure: str,
) -> float:
    """Returns the budget that a share of the dense cost is.

    Raises:
      SmallBudget: Both rank 1 everywhere and the full ranks cost more.
      UserError: The measure is another one, the share is out of bounds, or MACs are
        asked for of layers that were never run.
    """
    if measure not in ("params", "macs", "latency"):
        raise UserError(
            "measure: must be 'params', 'macs' or 'latency', got"
            f" {measure!r}. Choose one."
        )
    if not 0 < fraction <= 1:
        raise UserError(
            f"{measure}_fraction: must be in (0, 1], got {fraction}."
            " Give a share of it."
        )
    fraction = float(fraction)
    dense = sum(getattr(costs[path], f"dense_{measure}") for path in max_ranks)
    check_run(costs, max_ranks, measure)
    # A lookup in a dense table costs no MACs, so that the full ranks may cost less.
    least = min(
        total_cost(costs, ranks, measure)
        for ranks in (at_most(max_ranks, 1), max_ranks)
    )
    if least and not dense:
        raise UserError(
            f"{measure}_fraction: must be of layers that cost {measure} when dense, got"
            f" lookups alone, {list(max_ranks)}. Give a share of the params."
        )
    if least > fraction * dense:
        raise SmallBudget(
            f"{measure}_fraction: must be at least {least / dense:.4g} here (rank 1 in"
            f" every layer, or no cut), got {fraction}. Raise it, or set ranks to"
            " 0 with a rank file."
        )
    return fraction * dense


def check_run(costs: Costs, max_ranks: Ranks, measure: str) -> None:
    if measure != "macs" or not max_ranks:
        return
    if not any(_was_run(costs[path]) for path in max_ranks):
        raise UserError(
            "macs_fraction: needs an example input that runs the low-rank layers, to"
            " count their MACs on, got none. Give the model's inputs for a batch of"
            " one."
        )


def _was_run(cost: Any) -> bool:
    """Tells whether a count ran the layer; a lookup multiplies by `v` at least."""
    return any((cost.dense_positions, cost.first_positions, cost.second_positions))
