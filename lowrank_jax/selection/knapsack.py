"""The ranks of least error in all within a budget, and the best nested chain of them.

Errors of the matrices are added. Both are dynamic programs: over the matrices for one
budget (L-GreCo, arXiv 2210.17357), over the budgets for a chain (FlexRank, arXiv
2602.02680, section 3; its published code solves without the nesting and keeps what
happens to nest).
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from lowrank_jax.errors import SmallBudget
from lowrank_jax.selection import hull
from lowrank_jax.selection.options import Options, Profiles

STATES = 4096
"""Choices for a part of the matrices that are kept: all that no other beats, up to this
number, past which one is kept for each of so many equal intervals of cost."""

CHAIN = 1500
"""Profiles that a chain is made of, at most."""


def pareto(
    table: Sequence[Options], budget: float, *, states: int = STATES
) -> Profiles:
    """Lists the choices within a budget that no other one beats in cost and error, by
    rising cost.

    Exact where no more than `states` are kept at any matrix.

    Args:
      table: The options of each matrix.
      budget: What a choice may cost.
      states: See `STATES`.
    """
    costs, errors = np.zeros(1), np.zeros(1)
    trail: list[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]] = []
    cheapest = [one.costs.min() for one in table]
    for number, one in enumerate(table):
        left = budget - sum(cheapest[number + 1 :])
        more_costs = np.add.outer(costs, one.costs).ravel()
        more_errors = np.add.outer(errors, one.errors).ravel()
        kept = _unbeaten(more_costs, more_errors, left, states)
        trail.append(np.divmod(kept, len(one.costs)))
        costs, errors = more_costs[kept], more_errors[kept]
    chosen, at = [], np.arange(len(costs))
    for before, option in reversed(trail):
        chosen.append(option[at])
        at = before[at]
    matrices = np.stack(chosen[::-1], axis=-1) if chosen else np.zeros((len(costs), 0))
    return Profiles(matrices.astype(int), costs, errors)


def solve(
    table: Sequence[Options], budget: float, *, states: int = STATES
) -> list[int]:
    """Returns the option of each matrix with the least error in all within a budget.

    Raises:
      SmallBudget: Nothing fits.
    """
    found = pareto(table, budget, states=states)
    _check_some(found.costs <= budget, budget)
    return found.options[np.argmin(found.errors)].tolist()


def best_chain(
    table: Sequence[Options], budgets: Sequence[float], *, candidates: int = CHAIN
) -> list[list[int]]:
    """Returns for each budget the options of a profile within it, each nested in the
    next larger one, with the least sum of errors over the budgets.

    A longest path over candidate profiles, ordered matrix by matrix: over all profiles
    there are, where these are few, and then it is the best chain; else over those that
    no other beats in cost and error, and the nested ones that are best for a price of
    cost (`hull`).

    Args:
      table: The options of each matrix.
      budgets: What the profiles may cost, in any order.
      candidates: How many profiles may be looked at.

    Raises:
      SmallBudget: Nothing fits the lowest budget.
    """
    found = _candidates(table, max(budgets), candidates)
    inside = _nested(found.options)
    order = np.argsort(budgets, kind="stable")[::-1]  # from large to small
    values = np.zeros(len(found.costs))
    before = []  # for each profile the best of those that it is nested in
    for place, number in enumerate(order):
        if place:
            reached = np.where(inside, values, np.inf)
            before.append(np.argmin(reached, axis=1))
            values = reached.min(axis=1)
        fits = found.costs <= budgets[number]
        _check_some(fits, budgets[number])
        values = np.where(fits, values + found.errors, np.inf)
    chain = [int(np.argmin(values))]
    for larger in reversed(before):
        chain.append(int(larger[chain[-1]]))
    result: list[list[int]] = [[]] * len(budgets)
    for number, at in zip(order[::-1], chain, strict=True):
        result[number] = found.options[at].tolist()
    return result


def _unbeaten(
    costs: Float[np.ndarray, " n"],
    errors: Float[np.ndarray, " n"],
    budget: float,
    states: int,
) -> Int[np.ndarray, " k"]:
    """Numbers of the choices within a budget that are better than all cheaper ones."""
    order = np.lexsort((errors, costs))
    order = order[costs[order] <= budget]
    best = np.minimum.accumulate(np.concatenate([[np.inf], errors[order]]))
    order = order[errors[order] < best[:-1]]
    if len(order) <= states:
        return order
    # Errors fall with the cost: the last of each interval is its best, the first of all
    # is the cheapest.
    low, high = costs[order[0]], costs[order[-1]]
    intervals = np.ceil((costs[order] - low) / (high - low) * (states - 1))
    last = np.append(np.diff(intervals) > 0, True)
    return order[last]


def _candidates(table: Sequence[Options], budget: float, most: int) -> Profiles:
    """The profiles that a chain is made of."""
    if math.prod(len(one.ranks) for one in table) > most:
        unbeaten = pareto(table, budget, states=most // 2)
        return _joined(unbeaten, hull.nested_path(table, most - most // 2))
    counts = [range(len(one.ranks)) for one in table]
    numbers = np.array(list(itertools.product(*counts)), int)

    def total(name: str) -> Float[np.ndarray, " n"]:
        columns = zip(table, numbers.T, strict=True)
        return sum((getattr(one, name)[at] for one, at in columns), np.zeros(1))

    return Profiles(numbers, total("costs"), total("errors"))


def _joined(first: Profiles, second: Profiles) -> Profiles:
    pairs = zip(first, second, strict=True)
    return Profiles(*[np.concatenate(pair) for pair in pairs])


def _nested(profiles: Int[np.ndarray, "n m"]) -> Bool[np.ndarray, "n n"]:
    """Tells for each profile, by row, in which ones it is nested."""
    inside = np.ones((len(profiles), len(profiles)), bool)
    for column in profiles.T:
        inside &= column[:, None] <= column[None, :]
    return inside


def _check_some(fits: Bool[np.ndarray, " n"], budget: float) -> None:
    if not fits.any():
        raise SmallBudget(
            f"budget: must be at least what the lowest ranks cost, got {budget:.4g}."
            " Raise it."
        )
