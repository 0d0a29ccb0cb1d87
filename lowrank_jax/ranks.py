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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from lowrank_jax import placement
from lowrank_jax.errors import UserError, raise_all

RankValue: TypeAlias = int | Sequence[Any]
"""A rank outside jit: an int, or a nested list of ints for stacked layers.

Arrays of NumPy and concrete ones of JAX are taken wherever one is given.
"""

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
    if isinstance(rank, Sequence):  # of unequal lengths too
        return [number for part in rank for number in flatten_rank(part)]
    return [int(number) for number in np.ravel(rank)]


def largest(rank: RankValue) -> int:
    """Returns what must be allocated to hold this rank, 0 for an empty stack."""
    return max(flatten_rank(rank), default=0)


def lowest(first: ArrayLike, second: ArrayLike) -> RankValue:
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
    return rank_between(0, rank, fraction)


def rank_between(low: int, high: int, place: float) -> int:
    """Returns the rank at a place in (0, 1] between two, rounded up as `fraction_of`.

    >>> [rank_between(4, 7, place) for place in (1 / 3, 0.5, 1.0)]
    [5, 6, 7]
    """
    check_fraction("rank_fraction", place)
    exact = low + fractions.Fraction(float(place)) * (high - low)
    nearest = round(exact)
    close = abs(exact - nearest) <= fractions.Fraction(1, 10**9) * max(high, 1)
    return max(nearest if close else math.ceil(exact), min(high, 1))


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

    def scaled(rank: Any) -> Any:
        if np.ndim(rank) == 0:
            return fraction_of(fraction, int(rank))
        return [scaled(part) for part in rank]

    return {path: scaled(rank) for path, rank in ranks.items()}


def check_lower(ranks: Ranks, limits: Mapping[str, Limits]) -> None:
    """Checks ranks to cut, shrink, select or load at: none may be above the active one.

    Raises:
      UserError: Unknown paths, ranks that are not whole numbers of the stack's shape,
        negative or above the active one, or below it in a form that is not nested; all
        offenders at once.
    """
    raise_all(_problems(ranks, limits, _problem_to_cut))


def check_active(ranks: Mapping[str, Any], limits: Mapping[str, Limits]) -> None:
    """Checks ranks to set: as `check_lower`, but up to the allocated rank.

    An array may have a trailing axis, with one rank per example.
    """
    raise_all(_problems(ranks, limits, _problem_to_set))


def unknown_paths(paths: Sequence[str], known: Sequence[str]) -> str:
    """Returns the message for paths that name no low-rank layer."""
    return (
        f"paths: must name low-rank layers, got {list(paths)}. The model has"
        f" {list(known)}. Correct the paths."
    )


def name_of(path: str) -> str:
    """Returns a layer's path as messages name it; the model itself has none."""
    return path or "the model itself"


def _problems(
    ranks: Ranks,
    limits: Mapping[str, Limits],
    problem_of: Callable[[Any, Limits], str],
) -> list[str]:
    """Unknown paths, and what is wrong with each rank at a known one."""
    unknown = [path for path in ranks if path not in limits]
    problems = [unknown_paths(unknown, list(limits))] if unknown else []
    for path, rank in ranks.items():
        if path in limits and (problem := problem_of(rank, limits[path])):
            problems.append(f"{name_of(path)}: {problem}")
    return problems


def _problem_to_cut(rank: Any, limits: Limits) -> str:
    """What is wrong with a rank to cut to; "" where nothing is."""
    fix = "columns that were cut or masked do not come back."
    return _problem(rank, limits, limits.active, fix)


def _problem_to_set(rank: Any, limits: Limits) -> str:
    """What is wrong with a rank to set; "" where nothing is."""
    fix = "columns that were never allocated cannot act."
    array = _whole_numbers(rank)
    if array is None or not _is_per_example(rank, limits.stack):
        return _problem(rank, limits, limits.allocated, fix)
    low, high = array.min(-1, initial=limits.allocated), array.max(-1, initial=0)
    given = f"{low.tolist()} to {high.tolist()} over the examples"
    if not limits.nested:
        return only_rank(limits.active, given)
    return _out_of_bounds(low, high, limits.allocated, given, fix)


def _problem(rank: Any, limits: Limits, limit: RankValue, fix: str) -> str:
    """What is wrong with one number, or one for each matrix; "" where nothing is."""
    array = _whole_numbers(rank)
    if array is None or array.shape not in ((), limits.stack):
        lists = f" or nested lists of shape {limits.stack}" if limits.stack else ""
        return (
            f"rank must be a whole number{lists}, got {rank!r}. Give one of that kind."
        )
    if not limits.nested and (array != np.asarray(limits.active)).any():
        return only_rank(limits.active, rank)
    return _out_of_bounds(array, array, limit, rank, fix)


def _whole_numbers(rank: Any) -> Int[np.ndarray, "..."] | None:
    """A rank as an array, None if it is of something else than whole numbers."""
    try:
        array = placement.to_host(rank)
    except ValueError:  # lists of unequal length
        return None
    return array if array.dtype.kind in "iu" else None


def _out_of_bounds(
    low: Int[np.ndarray, "..."],
    high: Int[np.ndarray, "..."],
    limit: RankValue,
    rank: Any,
    fix: str,
) -> str:
    """The message for a rank whose numbers are not in [0, limit], "" where they are."""
    if (low >= 0).all() and (high <= np.asarray(limit)).all():
        return ""
    different = set(flatten_rank(limit))
    limit = different.pop() if len(different) == 1 else limit
    return f"rank must be in [0, {limit}], got {rank}. Lower it; {fix}"


def only_rank(active: RankValue, rank: Any) -> str:
    """Returns the message for another rank of a form that is not nested."""
    return (
        f"rank must be {active}, the only one of its form, got {rank}. Cut the factored"
        " model it was made from instead."
    )


def _is_per_example(rank: Any, stack: tuple[int, ...]) -> bool:
    """Whether a rank is an array with one axis more than the stack."""
    shape = getattr(rank, "shape", ())
    return bool(shape) and tuple(shape[:-1]) == stack
