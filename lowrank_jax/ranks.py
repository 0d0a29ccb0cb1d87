"""Ranks outside jit: values, mappings, fractions, and the one check of legality.

A layer has two ranks. The *allocated* one is how many columns its arrays have, the
*active* one how many of them act. One rule holds everywhere: whoever reads a model
(selection, shrinking, cutting, costs, saving, loading) speaks of the active rank, and
no cut, shrink, selection or load ever raises it; `set_ranks` alone moves it, within
what is allocated. The rank of a stacked or grouped layer is a nested list, one number
for each matrix.
"""

import fractions
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lowrank_jax.errors import UserError, raise_all

RankValue: TypeAlias = int | Sequence[Any]
"""A rank outside jit: an int, or a nested list of ints for stacked layers."""

Ranks: TypeAlias = Mapping[str, RankValue]
"""One rank per layer, by the layer's path."""


class Limits(NamedTuple):
    """What bounds the rank of one layer.

    Args:
      active: Its active rank, in the shape of its stack.
      allocated: Its allocated rank.
      nested: Whether a lower rank of it is a model: false for forms whose columns are
        not ordered any more.
    """

    active: RankValue
    allocated: int
    nested: bool = True

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the shape of the layer's stack, `()` for one matrix."""
        return np.shape(self.active)


def flatten_rank(rank: RankValue) -> list[int]:
    """Lists the numbers of a rank: `[r]` for an int, row by row for nested lists."""
    if isinstance(rank, Sequence):
        return [number for part in rank for number in flatten_rank(part)]
    return [int(rank)]


def largest(rank: RankValue) -> int:
    """Returns what must be allocated to hold this rank, 0 for an empty stack."""
    return max(flatten_rank(rank), default=0)


def lowest(first: RankValue, second: RankValue) -> RankValue:
    """Returns the lower of two ranks, matrix by matrix."""
    return np.minimum(first, second).tolist()


def fraction_of(fraction: float, rank: int) -> int:
    """Returns a fraction of a rank, rounded up, without the errors of floating point.

    `ceil(7 / 25 * 25)` is 8 in floats. A product within a billionth above a whole
    number counts as that number, so that `fraction_of(k / n, n) == k`; the result is
    at least 1 where the rank is.

    >>> fraction_of(7 / 25, 25), fraction_of(0.25, 10), fraction_of(1e-7, 4096)
    (7, 3, 1)
    """
    check_fraction("rank_fraction", fraction)
    product = fractions.Fraction(float(fraction)) * rank
    nearest = round(product)
    exact = abs(product - nearest) <= fractions.Fraction(1, 10**9) * max(rank, 1)
    return max(nearest if exact else math.ceil(product), min(rank, 1))


def check_fraction(where: str, fraction: float) -> None:
    """Raises UserError unless a fraction is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise UserError(
            f"{where}: must be in (0, 1], got {fraction}. Give a fraction of that kind."
        )


def at_most(ranks: Ranks, rank: int) -> dict[str, Any]:
    """Caps every layer at one rank."""
    if rank < 0:
        raise UserError(f"rank: must be at least 0, got {rank}. Raise it.")
    return {path: lowest(active, rank) for path, active in ranks.items()}


def at_fraction(ranks: Ranks, fraction: float) -> dict[str, Any]:
    """Takes a fraction in (0, 1] of each rank, rounded up."""

    def scaled(rank: RankValue) -> Any:
        if isinstance(rank, int):
            return fraction_of(fraction, rank)
        return [scaled(part) for part in rank]

    return {path: scaled(rank) for path, rank in ranks.items()}


def check_lower(ranks: Ranks, limits: Mapping[str, Limits]) -> None:
    """Checks ranks to cut, shrink, select or load at: none may be above the active one.

    Raises:
      UserError: Unknown paths, ranks that are not whole numbers of the stack's shape,
        negative or above the active one, or below it in a form that is not nested; all
        offenders at once.
    """
    raise_all(_problems(ranks, limits, raises=False))


def check_active(ranks: Mapping[str, Any], limits: Mapping[str, Limits]) -> None:
    """Checks ranks to set: as `check_lower`, but up to the allocated rank.

    An array may have a trailing axis, with one rank per example.
    """
    raise_all(_problems(ranks, limits, raises=True))


def unknown_paths(paths: Sequence[str], known: Sequence[str]) -> str:
    """Returns the message for paths that name no low-rank layer."""
    return (
        f"paths: must name low-rank layers, got {list(paths)}. The model has"
        f" {list(known)}."
    )


def name_of(path: str) -> str:
    """Returns a layer's path as messages name it; the model itself has none."""
    return path or "the model itself"


def _problems(ranks: Ranks, limits: Mapping[str, Limits], raises: bool) -> list[str]:
    unknown = [path for path in ranks if path not in limits]
    problems = [unknown_paths(unknown, list(limits))] if unknown else []
    for path, rank in ranks.items():
        if path in limits:
            problem = _problem(rank, limits[path], raises)
            problems += [f"{name_of(path)}: {problem}"] if problem else []
    return problems


def _problem(rank: Any, limits: Limits, raises: bool) -> str:
    try:
        array = np.asarray(rank)
    except ValueError:  # lists of unequal length
        array = np.asarray(None)
    stack = limits.stack
    per_example = (
        raises and _is_array(rank) and array.shape[:-1] == stack and array.ndim
    )
    if array.dtype.kind not in "iu" or not (per_example or array.shape in ((), stack)):
        lists = f" or nested lists of shape {stack}" if stack else ""
        return (
            f"rank must be a whole number{lists}, got {rank!r}. Give one of that kind."
        )
    limit, active = limits.allocated if raises else limits.active, limits.active
    low, high = array, array
    if per_example:
        low, high = array.min(-1, initial=limits.allocated), array.max(-1, initial=0)
        rank = f"{low.tolist()} to {high.tolist()} over the examples"
    if not limits.nested and (per_example or (array != np.asarray(active)).any()):
        return only_rank(active, rank)
    if (low < 0).any() or (high > np.asarray(limit)).any():
        fix = (
            "columns that were never allocated cannot act."
            if raises
            else "columns that were cut or masked do not come back."
        )
        different = set(flatten_rank(limit))
        limit = different.pop() if len(different) == 1 else limit
        return f"rank must be in [0, {limit}], got {rank}. Lower it; {fix}"
    return ""


def only_rank(active: RankValue, rank: Any) -> str:
    """Returns the message for another rank of a form that is not nested."""
    return (
        f"rank must be {active}, the only one of its form, got {rank}. Cut the factored"
        " model it was made from instead."
    )


def _is_array(rank: Any) -> bool:
    return hasattr(rank, "shape") and hasattr(rank, "dtype")
