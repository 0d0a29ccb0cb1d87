"""The profiles that are best for some price of cost: the lower convex hull of each
matrix's errors over its costs, walked by all matrices at one price."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lowrank_jax.selection.options import Options, Profiles


class _Step(NamedTuple):
    """From one option of a matrix to a cheaper one.

    Args:
      price: The error it adds for each unit of cost.
      matrix: Whose option it is.
      option: Its number.
      saved: The cost.
      added: The error.
    """

    price: float
    matrix: int
    option: int
    saved: float
    added: float


def nested_path(table: Sequence[Options], most: int | None = None) -> Profiles:
    """Lists nested profiles from the active ranks down, in each step what adds the
    least error for what it saves.

    After the steps of one price every matrix has `argmin price * cost + error`.

    Args:
      table: The options of each matrix.
      most: How many profiles to list, evenly spaced; None for all.
    """
    steps = [step for number, one in enumerate(table) for step in _steps(number, one)]
    steps.sort(key=lambda step: step.price)
    at = np.array([len(one.ranks) - 1 for one in table], int)
    wanted = np.arange(len(steps) + 1)
    if most is not None and len(wanted) > most:
        wanted = np.unique(np.linspace(0, len(steps), most).astype(int))
    listed = [at.copy()]
    for number, step in enumerate(steps, 1):
        at[step.matrix] = step.option
        if number == wanted[min(len(listed), len(wanted) - 1)]:
            listed.append(at.copy())
    costs = sum(one.costs[-1] for one in table) - np.cumsum(
        [0.0, *(step.saved for step in steps)]
    )
    errors = sum(one.errors[-1] for one in table) + np.cumsum(
        [0.0, *(step.added for step in steps)]
    )
    return Profiles(np.stack(listed), costs[wanted], errors[wanted])


def _steps(matrix: int, one: Options) -> Iterator[_Step]:
    """Goes down the hull, prices rising."""
    at = len(one.ranks) - 1
    while True:
        saved = one.costs[at] - one.costs[:at]
        cheaper = np.flatnonzero(saved > 0)
        if not len(cheaper):
            return
        added, saved = one.errors[cheaper] - one.errors[at], saved[cheaper]
        prices = added / saved
        # of equal prices the one that saves most
        best = np.flatnonzero(prices <= prices.min() * (1 + 1e-12))
        chosen = best[np.argmax(saved[best])]
        at = int(cheaper[chosen])
        yield _Step(prices[chosen], matrix, at, saved[chosen], added[chosen])
