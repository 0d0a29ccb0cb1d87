"""Solvers: from curves and a budget to one rank per layer.

The budget is a share of what the factored layers cost when dense. No solver exceeds it,
and each returns the active ranks where they fit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_jax.ranks import Ranks, at_fraction
from lowrank_jax.selection import budgets, hull, knapsack, options
from lowrank_jax.selection.budgets import Costs
from lowrank_jax.selection.options import Options, list_options
from lowrank_jax.selection.tails import Errors


def by_params_fraction(
    costs: Costs, max_ranks: Ranks, params_fraction: float
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
    costs: Costs, max_ranks: Ranks, macs_fraction: float
) -> dict[str, Any]:
    """Finds the same as `by_params_fraction` for a budget of MACs."""
    return _common_fraction(costs, max_ranks, macs_fraction, "macs")


def by_level(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fraction: float,
    *,
    measure: str,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Finds the lowest level of error, one for all layers, whose ranks fit a budget.

    It minimizes the largest error of a layer. Each layer has the least rank whose error
    is at the level or below, 1 at least where the layer's own is. With the tails of
    "operator_norm" this is one global threshold on s / s_1 and ALDS with one channel
    group (Liebenwein et al., 2021), with "min_max" WeLore (arXiv 2407.11239), with
    "energy" one share of energy in all layers.

    Args:
      costs: Cost of each layer.
      max_ranks: Ranks that are not exceeded.
      errors: What each rank loses, as of `tails.list_errors`.
      fraction: Budget as a share, in (0, 1], of what the layers cost when dense.
      measure: "params", "macs" or "latency".
      multiple_of: Ranks are multiples of it, or the layer's own; those of a layer that
        has no multiple are any.

    Raises:
      UserError: As `budgets.check_budget`.
    """
    table, (budget,) = _within(
        costs, max_ranks, errors, [fraction], measure, multiple_of
    )
    return _at_level(table, max_ranks, budget)


def by_energy_at_fraction(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fraction: float,
) -> dict[str, Any]:
    """Keeps one share of energy in all layers, at no more MACs than a fraction of every
    rank has.

    Where costs rise with the rank, as all but those of tables do, smaller fractions
    give lower ranks, none higher: what they choose is nested.

    Args:
      costs: As of `by_level`.
      max_ranks: As of `by_level`.
      errors: As of `by_level`.
      fraction: Of every rank, in (0, 1].
    """
    budgets.check_run(costs, max_ranks, "macs")
    uniform = at_fraction(max_ranks, fraction)
    budget = budgets.total_cost(costs, uniform, "macs")
    table = list_options(costs, max_ranks, errors, "macs")
    found = _at_level(table, max_ranks, budget)
    # A table's MACs fall at its full rank: no level may cost as little as the fraction.
    fits = budgets.total_cost(costs, found, "macs") <= budget
    return found if fits else uniform


def by_price(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fraction: float,
    *,
    measure: str,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Finds the lowest price of cost at which each layer's best rank fits a budget.

    Each layer has `argmin_r price * cost(r) + error(r)`, as in the learning-compression
    algorithm (LC, Idelbayev and Carreira-Perpinan, 2020) with the squared error in the
    matrix. A smaller budget means a higher price, and no rank rises.

    Args:
      costs: As of `by_level`.
      max_ranks: As of `by_level`.
      errors: As of `by_level`.
      fraction: As of `by_level`.
      measure: As of `by_level`.
      multiple_of: As of `by_level`.
    """
    table, (budget,) = _within(
        costs, max_ranks, errors, [fraction], measure, multiple_of
    )
    if options.all_fit(table, budget):
        return dict(max_ranks)
    path = hull.nested_path(table)
    first = int(np.argmax(path.costs <= budget))
    return options.as_ranks(max_ranks, options.ranks_at(table, path.options[first]))


def by_knapsack(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fraction: float,
    *,
    measure: str,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Finds the ranks with the least sum of errors within a budget.

    See `knapsack`. The least sum of another budget may lie at other ranks: those of a
    smaller one are not nested in those of a larger.

    Args:
      costs: As of `by_level`.
      max_ranks: As of `by_level`.
      errors: As of `by_level`.
      fraction: As of `by_level`.
      measure: As of `by_level`.
      multiple_of: As of `by_level`.
    """
    table, (budget,) = _within(
        costs, max_ranks, errors, [fraction], measure, multiple_of
    )
    if options.all_fit(table, budget):
        return dict(max_ranks)
    chosen = knapsack.solve(table, budget)
    return options.as_ranks(max_ranks, options.ranks_at(table, chosen))


def by_chain(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fractions: Sequence[float],
    *,
    measure: str,
    multiple_of: int = 1,
) -> list[dict[str, Any]]:
    """Finds nested ranks, one profile for each of several budgets, with the least sum
    of errors in all: the best chain, see `knapsack.best_chain`.

    Args:
      costs: As of `by_level`.
      max_ranks: As of `by_level`.
      errors: As of `by_level`.
      fractions: The budgets, each as of `by_level`; the profiles come in their order.
      measure: As of `by_level`.
      multiple_of: As of `by_level`.
    """
    table, totals = _within(costs, max_ranks, errors, fractions, measure, multiple_of)
    return [
        dict(max_ranks)
        if options.all_fit(table, budget)
        else options.as_ranks(max_ranks, options.ranks_at(table, chosen))
        for budget, chosen in zip(
            totals, knapsack.best_chain(table, totals), strict=True
        )
    ]


def _within(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    fractions: Sequence[float],
    measure: str,
    multiple_of: int,
) -> tuple[list[Options], list[float]]:
    """The options of all matrices, and the budgets that shares of the dense cost are;
    all of them checked."""
    totals = [
        budgets.check_budget(costs, max_ranks, fraction, measure)
        for fraction in fractions
    ]
    table = list_options(costs, max_ranks, errors, measure, multiple_of=multiple_of)
    options.check_least(table, min(totals), multiple_of)
    return table, totals


def _at_level(table: list[Options], max_ranks: Ranks, budget: float) -> dict[str, Any]:
    """The lowest level of error whose ranks cost no more than the budget."""
    if options.all_fit(table, budget):
        return dict(max_ranks)
    levels = np.unique(np.concatenate([one.errors for one in table]))
    # Of each matrix the first option at the level or below; errors fall.
    first = [
        np.minimum(
            len(one.errors) - np.searchsorted(one.errors[::-1], levels, side="right"),
            len(one.errors) - 1,
        )
        for one in table
    ]
    total = sum(one.costs[at] for one, at in zip(table, first, strict=True))
    fits = np.less_equal(total, budget)
    if fits.any():
        at_best = [at[int(np.argmax(fits))] for at in first]
    else:  # the cheapest of a table may be its full rank, which no common level has
        at_best = [int(np.argmin(one.costs)) for one in table]
    return options.as_ranks(max_ranks, options.ranks_at(table, at_best))


def _common_fraction(
    costs: Costs, max_ranks: Ranks, share: float, measure: str
) -> dict[str, Any]:
    """Scans the fractions at which a rank changes, from the full ranks down.

    Nothing is taken for granted of the cost: that of a factored table falls to 0 MACs
    at the rank where the merged one is smaller.
    """
    budget = budgets.check_budget(costs, max_ranks, share, measure)
    full = {path: np.ravel(rank) for path, rank in max_ranks.items()}
    different = np.unique(np.concatenate([np.ones(1, int), *full.values()]))
    levels = np.unique(
        np.concatenate([np.arange(1, n + 1) / n for n in different if n])
    )[::-1]
    total = np.zeros(len(levels))
    for path, ranks in full.items():
        at_levels = np.ceil(levels[:, None] * ranks - 1e-9 * ranks).astype(int)
        table = {
            int(rank): getattr(costs[path], measure)(int(rank))
            for rank in np.unique(at_levels)
        }
        each = np.vectorize(table.__getitem__, otypes=[float])(at_levels)
        total += each.sum(axis=-1) / max(len(ranks), 1)
    return at_fraction(max_ranks, float(levels[np.argmax(total <= budget)]))
