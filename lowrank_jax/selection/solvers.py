"""Solvers: from curves and a budget to one rank per layer."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, at_fraction, at_most, lowest, name_of


def by_energy(
    importances: Mapping[str, Float[np.ndarray, "*stack r"]], energy: float
) -> dict[str, Any]:
    """Returns the least prefix of each layer with this share of squared importances.

    Args:
      importances: Importance of each column, in the order in which it would be kept.
      energy: Share to keep, in (0, 1]; a share that is met exactly is met, and all of
        it are all columns up to the last that has any.

    Raises:
      UserError: The share is out of bounds, or an importance is not finite.

    >>> by_energy({"a": np.array([4.0, 3.0, 2.0, 1.0])}, 0.9)
    {'a': 3}
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy: must be in (0, 1], got {energy}. Give a share of it.")
    _check_finite(importances)
    ranks = {}
    for path, importance in importances.items():
        removed = _removed_energy(importance)
        # Sums are in floats: 1e-12 of the share may be missing, but not of all of it.
        allowed = 0.0 if energy == 1 else 1 - energy * (1 - 1e-12)
        # The prefix of length n is short of the share for n = 1 .. rank - 1.
        short = (removed > allowed).sum(axis=-1)
        ranks[path] = np.where((importance != 0).any(axis=-1), short + 1, 0).tolist()
    return ranks


def by_params_fraction(
    costs: Mapping[str, LayerCost], max_ranks: Ranks, params_fraction: float
) -> dict[str, Any]:
    """Finds the largest common fraction of the ranks within a parameter budget.

    Args:
      costs: Cost of each layer.
      max_ranks: Ranks to take the fraction of.
      params_fraction: Budget as a share, in (0, 1], of the dense parameters of these
        layers. A layer counts with the smaller of its forms.

    Raises:
      UserError: The share is out of bounds, or rank 1 everywhere is over the budget.
    """
    return _common_fraction(costs, max_ranks, params_fraction, "params")


def by_macs_fraction(
    costs: Mapping[str, LayerCost], max_ranks: Ranks, macs_fraction: float
) -> dict[str, Any]:
    """Finds the same as `by_params_fraction` for a budget of MACs."""
    return _common_fraction(costs, max_ranks, macs_fraction, "macs")


def by_energy_budget(
    costs: Mapping[str, LayerCost],
    max_ranks: Ranks,
    importances: Mapping[str, Float[np.ndarray, "*stack r"]],
    fraction: float,
    *,
    measure: str,
) -> dict[str, Any]:
    """Finds the largest common share of energy within a budget.

    The ranks are those of `by_energy` with the share found, but rank 1 at least where
    the layer's own is.

    Args:
      costs: Cost of each layer.
      max_ranks: Ranks that are not exceeded.
      importances: Importance of each column, in the order in which it would be kept.
      fraction: Budget as a share, in (0, 1], of what the layers cost when dense.
      measure: "params" or "macs".
    """
    budget = check_budget(costs, max_ranks, fraction, measure)
    return _by_energy_within(costs, max_ranks, importances, budget, measure)


def by_energy_at_fraction(
    costs: Mapping[str, LayerCost],
    max_ranks: Ranks,
    importances: Mapping[str, Float[np.ndarray, "*stack r"]],
    fraction: float,
) -> dict[str, Any]:
    """Keeps one share of energy in all layers, at no more MACs than a fraction of every
    rank has.

    Smaller fractions give lower ranks, none higher: what they choose is nested.

    Args:
      costs: As of `by_energy_budget`.
      max_ranks: As of `by_energy_budget`.
      importances: As of `by_energy_budget`.
      fraction: Of every rank, in (0, 1].
    """
    _check_run(costs, max_ranks, "macs")
    budget = total_cost(costs, at_fraction(max_ranks, fraction), "macs")
    return _by_energy_within(costs, max_ranks, importances, budget, "macs")


def _by_energy_within(
    costs: Mapping[str, LayerCost],
    max_ranks: Ranks,
    importances: Mapping[str, Float[np.ndarray, "*stack r"]],
    budget: float,
    measure: str,
) -> dict[str, Any]:
    """The lowest threshold of energy whose ranks cost no more than the budget."""
    _check_finite(importances)
    removed = {path: _removed_energy(columns) for path, columns in importances.items()}

    def ranks_at(threshold: float) -> dict[str, Any]:
        return {
            path: lowest((1 + (share > threshold).sum(axis=-1)).tolist(), max_rank)
            for path, max_rank in max_ranks.items()
            for share in [removed[path]]
        }

    levels = np.unique(np.concatenate([[0.0], *(r.ravel() for r in removed.values())]))
    at_levels = {path: _kept_columns(share, levels) for path, share in removed.items()}
    fits = _costs_at(costs, max_ranks, at_levels, measure) <= budget
    # Columns of nothing may save by being there: a table of full rank is merged.
    if not fits[0] and total_cost(costs, max_ranks, measure) <= budget:
        return dict(max_ranks)
    return ranks_at(levels[np.argmax(fits)])


def total_cost(costs: Mapping[str, LayerCost], ranks: Ranks, measure: str) -> int:
    """Sums what layers cost at these ranks, in "params" or "macs"."""
    return sum(getattr(costs[path], measure)(rank) for path, rank in ranks.items())


def check_budget(
    costs: Mapping[str, LayerCost],
    max_ranks: Ranks,
    fraction: float,
    measure: str,
) -> float:
    """Returns the budget that a share of the dense cost is.

    Raises:
      UserError: The measure is another one, the share is out of bounds, both rank 1
        everywhere and the full ranks cost more, or MACs are asked for of layers that
        were never run.
    """
    if measure not in ("params", "macs"):
        raise UserError(
            f"measure: must be 'params' or 'macs', got {measure!r}. Choose one."
        )
    if not 0 < fraction <= 1:
        raise UserError(
            f"{measure}_fraction: must be in (0, 1], got {fraction}."
            " Give a share of it."
        )
    fraction = float(fraction)
    dense = sum(getattr(costs[path], f"dense_{measure}") for path in max_ranks)
    _check_run(costs, max_ranks, measure)
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
        raise UserError(
            f"{measure}_fraction: must be at least {least / dense:.4g} here (rank 1 in"
            f" every layer, or no cut), got {fraction}. Raise it, or set ranks to"
            " 0 with a rank file."
        )
    return fraction * dense


def scaled_stable_ranks(
    stable_ranks: Mapping[str, Float[np.ndarray, "*stack"]],
    initial: Mapping[str, Float[np.ndarray, "*stack"]],
    full_ranks: Mapping[str, int],
) -> dict[str, Any]:
    """Scales stable ranks so that they are full at the start: Cuttlefish's rule.

    `r = min(R, ceil(xi * sr))` with `xi = R / sr(init)` (Wang et al., 2023).

    Args:
      stable_ranks: Of each layer now.
      initial: Of each layer when it was initialised.
      full_ranks: R of each layer.

    >>> scaled_stable_ranks({"a": np.array(2.0)}, {"a": np.array(4.0)}, {"a": 10})
    {'a': 5}
    """
    ranks = {}
    for path, now in stable_ranks.items():
        full = full_ranks[path]
        first = np.asarray(initial[path], np.float64)
        positive = first > 0  # a layer that started at zero has no scale: full rank
        scaled = np.asarray(now, np.float64) * full / np.where(positive, first, 1)
        scaled = np.where(positive, scaled, full)
        ranks[path] = np.clip(np.ceil(scaled - 1e-6), 1, full).astype(int).tolist()
    return ranks


def stands_still(
    history: Float[np.ndarray, "t n"],
    *,
    window: int = 15,
    points: int = 11,
    tolerance: float = 0.1,
) -> bool:
    """Tells whether the moving average of every series is flat, as Cuttlefish does.

    Exponential moving averages with weight 2 / (window + 1); flat is a mean absolute
    gradient of at most the tolerance over the last points (Wang et al., 2023, their
    code).

    Args:
      history: One row for each measurement, one column for each layer.
      window: Of the moving average.
      points: How many of the last averages to look at; fewer measurements are no
        answer.
      tolerance: Change between two measurements that counts as standing still.
    """
    if len(history) < points:
        return False
    alpha, averages = 2 / (window + 1), [history[0]]
    for row in history[1:]:
        averages.append(alpha * row + (1 - alpha) * averages[-1])
    slopes = np.gradient(np.stack(averages[-points:]), axis=0)
    return bool((np.abs(slopes).mean(axis=0) <= tolerance).all())


def _common_fraction(
    costs: Mapping[str, LayerCost], max_ranks: Ranks, share: float, measure: str
) -> dict[str, Any]:
    """Scans the fractions at which a rank changes, from the full ranks down.

    Nothing is taken for granted of the cost: that of a factored table falls to 0 MACs
    at the rank where the merged one is smaller.
    """
    budget = check_budget(costs, max_ranks, share, measure)
    full = {path: np.ravel(rank) for path, rank in max_ranks.items()}
    different = np.unique(np.concatenate([np.ones(1, int), *full.values()]))
    levels = np.unique(
        np.concatenate([np.arange(1, n + 1) / n for n in different if n])
    )
    levels = levels[::-1]
    at_levels = {
        path: np.ceil(levels[:, None] * ranks - 1e-9 * ranks).astype(int)
        for path, ranks in full.items()
    }
    fits = _costs_at(costs, max_ranks, at_levels, measure) <= budget
    return at_fraction(max_ranks, float(levels[np.argmax(fits)]))


def _kept_columns(
    removed: Float[np.ndarray, "*stack r"], levels: Float[np.ndarray, " n"]
) -> Int[np.ndarray, "n m"]:
    """Counts the columns of each matrix that stay when each level of energy may go."""
    rows = removed.reshape(math.prod(removed.shape[:-1]), removed.shape[-1])
    kept = np.ones((len(levels), len(rows)), int)
    for matrix, row in enumerate(rows):
        rising = row[::-1]
        kept[:, matrix] += len(row) - np.searchsorted(rising, levels, side="right")
    return kept


def _costs_at(
    costs: Mapping[str, LayerCost],
    max_ranks: Ranks,
    at_levels: Mapping[str, Int[np.ndarray, "n m"]],
    measure: str,
) -> Int[np.ndarray, " n"] | int:
    """Sums what layers cost at each of many levels of their ranks, capped at the full
    ones; a layer's matrices, in `m`, cost the same at the same rank."""
    total = np.zeros(1, int)
    for path, max_rank in max_ranks.items():
        ranks = np.minimum(at_levels[path], np.ravel(max_rank))
        table = np.zeros(ranks.max(initial=0) + 1, int)
        for rank in np.unique(ranks):
            table[rank] = getattr(costs[path], measure)(int(rank))
        total = total + table[ranks].sum(axis=-1) // max(ranks.shape[-1], 1)
    return total


def _check_run(costs: Mapping[str, LayerCost], max_ranks: Ranks, measure: str) -> None:
    if measure != "macs" or not max_ranks:
        return
    if not any(_was_run(costs[path]) for path in max_ranks):
        raise UserError(
            "macs_fraction: needs an example input that runs the low-rank layers, to"
            " count their MACs on, got none. Give the model's inputs for a batch of"
            " one."
        )


def _was_run(cost: LayerCost) -> bool:
    """Tells whether a count ran the layer; a lookup multiplies by `v` at least."""
    return any((cost.dense_positions, cost.first_positions, cost.second_positions))


def _check_finite(importances: Mapping[str, Float[np.ndarray, "*stack r"]]) -> None:
    broken = [
        name_of(path)
        for path, columns in importances.items()
        if not np.isfinite(columns).all()
    ]
    if broken:
        raise UserError(
            f"{', '.join(broken)}: importances must be finite, got NaN or infinity."
            " Train or load the model anew."
        )


def _removed_energy(
    importance: Float[np.ndarray, "*stack r"],
) -> Float[np.ndarray, "*stack r"]:
    """Returns the share of energy that goes when a prefix of 1, 2, ..., r stays.

    The tails are summed from their own end, so that a small one keeps its value beside
    a large head, and only a tail of nothing is 0.
    """
    squares = np.square(np.asarray(importance, np.float64))
    total = squares.sum(axis=-1, keepdims=True)
    following = np.zeros_like(squares)
    following[..., :-1] = squares[..., 1:]
    tails = np.cumsum(following[..., ::-1], axis=-1)[..., ::-1]
    return tails / np.where(total > 0, total, 1)
