"""Solvers: from curves and a budget to one rank per layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lowrank_jax.cost import LayerCost, RankValue, fraction_of


def at_most(max_ranks: Mapping[str, RankValue], rank: int) -> dict[str, Any]:
    """Every layer at most at one rank."""
    if rank < 0:
        raise ValueError(f"rank: must be at least 0, got {rank}.")
    return {p: np.minimum(limit, rank).tolist() for p, limit in max_ranks.items()}


def at_fraction(max_ranks: Mapping[str, RankValue], fraction: float) -> dict[str, Any]:
    """Each allocated rank times a fraction in (0, 1], rounded up."""

    def scaled(limit: RankValue) -> Any:
        if isinstance(limit, int):
            return fraction_of(fraction, limit)
        return [scaled(part) for part in limit]

    return {path: scaled(limit) for path, limit in max_ranks.items()}


def by_energy(
    importances: Mapping[str, Float[np.ndarray, "*stack r"]], energy: float
) -> dict[str, Any]:
    """The least prefix of each layer that keeps this share of the squared importances.

    Args:
      importances: Importance of each column, in the order in which it would be kept.
      energy: Share to keep, in (0, 1]; a share that is met exactly is met.

    >>> by_energy({"a": np.array([4.0, 3.0, 2.0, 1.0])}, 0.9)
    {'a': 3}
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy: must be in (0, 1], got {energy}.")
    ranks = {}
    for path, importance in importances.items():
        squares = np.square(np.asarray(importance, np.float64))
        kept = np.cumsum(squares, axis=-1)
        needed = energy * kept[..., -1:] * (1 - 1e-12) if squares.shape[-1] else kept
        # the prefix of length n is short of the share for n = 0 .. rank - 1
        short = (kept < needed).sum(axis=-1)
        total = squares.sum(axis=-1)
        ranks[path] = np.where(total > 0, short + 1, 0).tolist()
    return ranks


def by_params_fraction(
    costs: Mapping[str, LayerCost],
    max_ranks: Mapping[str, RankValue],
    params_fraction: float,
) -> dict[str, Any]:
    """The largest common fraction of the ranks within a parameter budget, by bisection.

    Args:
      costs: Cost of each layer.
      max_ranks: Allocated ranks.
      params_fraction: Budget as a share, in (0, 1], of the dense parameters of these
        layers. A layer counts with the smaller of its forms.

    Raises:
      ValueError: The share is out of bounds, or rank 1 everywhere is over the budget.
    """
    if not 0 < params_fraction <= 1:
        raise ValueError(f"params_fraction: must be in (0, 1], got {params_fraction}.")
    dense = sum(cost.dense_params for cost in costs.values())

    def params(fraction: float) -> int:
        ranks = at_fraction(max_ranks, fraction)
        return sum(costs[path].params(ranks[path]) for path in ranks)

    steps = 1 << 16  # finer than one rank of any layer below 65,536
    low, high = 1, steps
    if params(low / steps) > params_fraction * dense:
        least = params(low / steps) / max(dense, 1)
        raise ValueError(
            f"params_fraction: must be at least {least:.4g} here (rank 1 in every"
            " layer),"
            f" got {params_fraction}. Raise it, or set ranks to 0 with a rank file."
        )
    while low < high:
        middle = (low + high + 1) // 2
        if params(middle / steps) <= params_fraction * dense:
            low = middle
        else:
            high = middle - 1
    return at_fraction(max_ranks, low / steps)
