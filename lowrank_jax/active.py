"""The active ranks of a model: read them, check them, set them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from lowrank_jax.errors import at
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    RankValue,
    check_active,
    check_lower,
    name_of,
)

SettableRanks: TypeAlias = Ranks | Mapping[str, Int[Array, "..."]]
"""Plain ranks, or arrays by path, traced ones included."""


def get_ranks(model: nnx.Module) -> dict[str, RankValue]:
    """Reads the active rank of each layer, as plain numbers."""
    return {path: factors.get_rank() for path, factors in find_factors(model).items()}


def max_ranks(model: nnx.Module) -> dict[str, RankValue]:
    """Reads the allocated rank of each layer, in the shape of its active one."""
    return {
        path: np.full(factors.stack_shape, factors.max_rank).tolist()
        for path, factors in find_factors(model).items()
    }


def rank_limits(model: nnx.Module) -> dict[str, Limits]:
    """Reads what bounds the rank of each layer."""
    return {path: factors.limits() for path, factors in find_factors(model).items()}


def check_ranks(model: nnx.Module, ranks: Ranks) -> dict[str, RankValue]:
    """Returns ranks to cut at under the paths of `find_factors`, checked.

    Raises:
      UserError: Unknown paths, ranks that are not whole numbers of the stack's shape in
        [0, active]; all offenders at once.
    """
    named = _by_first_path(model, ranks)
    check_lower(named, rank_limits(model))
    return named


def set_ranks(model: nnx.Module, ranks: SettableRanks) -> None:
    """Sets the active ranks, in place; nothing recompiles.

    Args:
      model: A low-rank model.
      ranks: By path, up to the allocated rank: plain numbers, or arrays, which may have
        a trailing axis for one rank per example. The values of traced arrays are not
        checked. Layers that are not named keep theirs.

    Raises:
      UserError: As `check_ranks`, with the allocated rank as the limit.
    """
    named = _by_first_path(model, ranks)
    factors = find_factors(model)
    unknown = {path: rank for path, rank in named.items() if path not in factors}
    concrete = {
        path: rank
        for path, rank in named.items()
        if not isinstance(rank, jax.core.Tracer)
    }
    if unknown or concrete:
        check_active({**unknown, **concrete}, rank_limits(model))
    for path, rank in named.items():
        with at(name_of(path)):
            factors[path].set_rank(rank)


@contextlib.contextmanager
def at_ranks(model: nnx.Module, ranks: SettableRanks) -> Iterator[nnx.Module]:
    """Runs a block at other active ranks; the model has its own again afterwards.

    Works on traced models, so that a training loop leaves no sampled rank behind.

    Args:
      model: A low-rank model.
      ranks: As for `set_ranks`.

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> with at_ranks(model, {"": 2}):
    ...     inside = get_ranks(model)
    >>> inside, get_ranks(model)
    ({'': 2}, {'': 4})
    """
    before = {
        path: (factors, factors.rank[...], factors.per_example)
        for path, factors in find_factors(model).items()
    }
    set_ranks(model, ranks)
    try:
        yield model
    finally:
        for factors, rank, per_example in before.values():
            factors.rank.set_value(rank)
            factors.per_example = per_example


def _by_first_path(model: nnx.Module, ranks: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks with the further paths of shared factors replaced by their first."""
    aliases = find_aliases(model)
    return {aliases.get(path, path): rank for path, rank in ranks.items()}
