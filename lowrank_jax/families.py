"""Families: nested rank vectors of one model, one for each of several sizes.

A size is a fraction in (0, 1], 1 for the whole model. Without a family it is this part
of every layer's rank. A family has ranks of its own for some fractions, chosen layer by
layer; the ranks at others lie on the straight line between two of them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lowrank_jax import errors
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    RankValue,
    at_fraction,
    check_fraction,
    check_lower,
    lowest,
    rank_between,
)

Family: TypeAlias = Sequence[tuple[float, Ranks]]
"""Ranks of all layers by fraction, below 1; empty where a size is one fraction of every
rank. Plain values: a checkpoint holds it as JSON."""


def member(family: Family, ranks: Ranks, fraction: float) -> dict[str, Any]:
    """Returns the ranks of a size.

    Args:
      family: Whose member it is.
      ranks: Of the whole model. Where a layer was cut below the family's rank since,
        it keeps what it has.
      fraction: The size, in (0, 1].

    >>> member([(0.5, {"a": 8, "b": 2})], {"a": 10, "b": 10}, 0.75)
    {'a': 9, 'b': 6}
    """
    if not family:
        return at_fraction(ranks, fraction)
    check_fraction("rank_fraction", fraction)
    nothing = {path: np.zeros_like(rank).tolist() for path, rank in ranks.items()}
    corners = sorted([(0.0, nothing), *family, (1.0, ranks)], key=lambda pair: pair[0])
    for (low, smaller), (high, larger) in itertools.pairwise(corners):
        if fraction <= high:
            place = (fraction - low) / (high - low)
            return {
                path: lowest(_between(smaller[path], larger[path], place), rank)
                for path, rank in ranks.items()
            }
    raise AssertionError("a fraction is at most 1")


def within(
    family: Family, ranks: Ranks, cost: Callable[[Ranks], float], budget: float
) -> dict[str, Any]:
    """Returns the ranks of the largest size that costs no more than a budget.

    Args:
      family: As of `member`; empty for fractions of every rank.
      ranks: As of `member`.
      cost: What ranks cost.
      budget: What they may.

    Raises:
      SmallBudget: The smallest size costs more.
    """
    if cost(ranks) <= budget:
        return dict(ranks)
    # The cost rises along the order; 2**-30 of it is finer than any rank.
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if cost(member(family, ranks, middle)) <= budget:
            low = middle
        else:
            high = middle
    if not low:
        raise SmallBudget(
            f"budget: must be at least what the smallest size costs, got {budget:.4g}."
            " Raise it."
        )
    return member(family, ranks, low)


def of_pairs(pairs: Any) -> list[tuple[float, Ranks]]:
    """Reads a family from JSON: a list of pairs of a fraction and ranks by path.

    Raises:
      UserError: It is something else; `check` says whether it fits a model.
    """
    pairs = list(pairs) if isinstance(pairs, Sequence) else [pairs]
    wrong = [
        pair
        for pair in pairs
        if not isinstance(pair, Sequence)
        or len(pair) != 2
        or not isinstance(pair[0], int | float)
        or not isinstance(pair[1], Mapping)
    ]
    if wrong:
        raise UserError(
            "family: must hold pairs of a fraction and ranks by path, got"
            f" {wrong[0]!r}. Write it as [[0.5, {{path: rank}}]]."
        )
    return [(float(fraction), ranks) for fraction, ranks in pairs]


def check(family: Family, limits: Mapping[str, Limits]) -> None:
    """Checks a family against the layers it is for.

    Raises:
      UserError: Fractions that come twice or are not below 1, or as `check_profiles`.
    """
    fractions = [fraction for fraction, _ in family]
    if len(set(fractions)) < len(fractions) or not all(0 < x < 1 for x in fractions):
        raise UserError(
            f"family: fractions must be in (0, 1), none twice, got {fractions}. The"
            " whole model is always there."
        )
    ordered = sorted(family, key=lambda pair: pair[0])
    profiles = {f"family at {fraction}": ranks for fraction, ranks in ordered}
    check_profiles(profiles, limits)
    check_nested([*profiles.values()])


def lowered(profile: Ranks, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """Caps ranks at the active ones: capped alike, nested vectors stay nested.

    Args:
      profile: What is no rank of a layer stays, for a check to name.
      limits: What bounds the ranks of each layer.
    """
    return {path: _lowered(rank, limits.get(path)) for path, rank in profile.items()}


def check_profiles(profiles: Mapping[str, Ranks], limits: Mapping[str, Limits]) -> None:
    """Checks rank vectors, named as messages name them.

    Raises:
      UserError: One that lacks a layer, or as `check_lower`.
    """
    for name, profile in profiles.items():
        with errors.at(name):
            check_lower(profile, limits)
            if missing := [path for path in limits if path not in profile]:
                raise UserError(
                    f"must name all low-rank layers, got none of {missing}. Complete"
                    " it."
                )


def check_nested(profiles: Sequence[Ranks]) -> None:
    """Raises UserError unless no rank rises from one to the next smaller.

    Args:
      profiles: Rank vectors of the same layers, from small to large.
    """
    for small, large in itertools.pairwise(profiles):
        higher = [
            path for path in small if np.any(np.greater(small[path], large[path]))
        ]
        if higher:
            raise UserError(
                "family: profiles must be nested, got a smaller one with a higher"
                f" rank at {higher}. Lower it there."
            )


def _lowered(rank: RankValue, limits: Limits | None) -> RankValue:
    if limits is None:
        return rank
    try:
        fits = np.shape(rank) in ((), limits.stack)
        return lowest(rank, limits.active) if fits else rank
    except (TypeError, ValueError):  # no numbers, or lists of unequal length
        return rank


def _between(low: Any, high: Any, place: float) -> Any:
    """The rank at a place between two, matrix by matrix."""
    if np.ndim(high) == 0:
        return rank_between(int(low), int(high), place)
    return [_between(*pair, place) for pair in zip(low, high, strict=True)]
