"""Samplers over levels that are fixed when they are made for a model."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    RankValue,
    check_lower,
    fraction_of,
    lowest,
)
from lowrank_jax.samplers.base import (
    ModelOrRanks,
    RankSampler,
    TableState,
    limits_of,
    ranks_at,
    table_at,
)

MOST_PASSES = 64
"""Of a step: each is a forward and a backward pass of its own in its program."""


def one_level(fractions: Sequence[float]) -> RankSampler:
    """Draws one of these fractions for all layers, all equally often."""
    return _draw_row(lambda model: table_at(fractions, model))


def sandwich(*, passes: int = 4, smallest: float = 0.125) -> RankSampler:
    """Takes the full model, the smallest, random ones between (Yu & Huang, 2019).

    Args:
      passes: Forward passes a step, at least 2: full, smallest, and passes - 2 with one
        uniformly random fraction in (smallest, 1] for all layers.
      smallest: The smallest fraction of the ranks, in (0, 1].
    """
    fraction_of(smallest, 1)
    if not 2 <= passes <= MOST_PASSES:
        raise UserError(
            f"sandwich: passes must be in [2, {MOST_PASSES}], got {passes}. Correct it."
        )

    def init(model: ModelOrRanks) -> TableState:
        return table_at([1.0, smallest], model)

    def sample(state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int):
        del step
        limits = {path: table[0] for path, table in state.tables.items()}
        random = jax.random.uniform(key, (passes - 2,), minval=smallest, maxval=1.0)
        middle = [ranks_at(fraction, limits) for fraction in random]
        ranks = {
            path: jnp.concatenate(
                [table, *(draw[path][None] for draw in middle)], axis=0
            )
            for path, table in state.tables.items()
        }
        return ranks, state

    return RankSampler(init, sample, passes=passes, full_first=True)


def matryoshka(*, fractions: Sequence[float]) -> RankSampler:
    """Takes all levels in every step, the full one first (Kusupati et al., 2022).

    Args:
      fractions: Fractions of the ranks, one pass each; 1 and at least one more.
    """
    levels = sorted(set(fractions), reverse=True)
    if len(levels) < 2 or levels[0] != 1:
        raise UserError(
            "matryoshka: fractions must hold 1 and a smaller one, got"
            f" {tuple(fractions)}. Use the sampler full for one level."
        )

    def sample(state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int):
        del key, step
        return state.tables, state

    return RankSampler(
        lambda model: table_at(levels, model),
        sample,
        passes=len(levels),
        full_first=True,
    )


def family(*, profiles: Sequence[Ranks]) -> RankSampler:
    """Draws one of a family's nested profiles a step, all equally often on average.

    `check` refuses profiles above the ranks of the model that training starts from.
    `init` lowers them to a model that has been cut since, so that shrinking goes on
    below them: capped at the same ranks, nested profiles stay nested.

    Args:
      profiles: Rank mappings, each with all layers, from large to small or the reverse;
        from one to the next smaller every rank falls or stays.
    """
    if not profiles:
        raise UserError("family: profiles must hold at least one, got none. Add one.")

    def check(model: ModelOrRanks) -> None:
        _check_profiles(profiles, limits_of(model))

    def init(model: ModelOrRanks) -> TableState:
        limits = limits_of(model)
        lowered = [
            {path: _lowered(rank, limits.get(path)) for path, rank in profile.items()}
            for profile in profiles
        ]
        _check_profiles(lowered, limits)
        return TableState(
            {
                path: jnp.stack(
                    [
                        jnp.broadcast_to(jnp.int32(profile[path]), limits[path].stack)
                        for profile in lowered
                    ]
                )
                for path in limits
            }
        )

    return _draw_row(init)._replace(check=check)


def _draw_row(init: Callable[[ModelOrRanks], TableState]) -> RankSampler:
    """Takes one row of the table each step, all rows equally likely."""

    def sample(state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int):
        del step
        rows = jax.tree.leaves(state.tables)[0].shape[0] if state.tables else 1
        level = jax.random.randint(key, (), 0, rows)
        return {path: table[level] for path, table in state.tables.items()}, state

    return RankSampler(init, sample)


def _lowered(rank: RankValue, limits: Limits | None) -> RankValue:
    """Caps a rank at the active one; what is no rank stays, for the check to name."""
    if limits is None:
        return rank
    try:
        return lowest(rank, limits.active) if _fits(rank, limits) else rank
    except (TypeError, ValueError):  # no numbers, or lists of unequal length
        return rank


def _fits(rank: RankValue, limits: Limits) -> bool:
    return np.shape(rank) in ((), limits.stack)


def _check_profiles(profiles: Sequence[Ranks], limits: Mapping[str, Limits]) -> None:
    for number, profile in enumerate(profiles):
        with errors.at(f"family.profiles[{number}]"):
            check_lower(profile, limits)
            if missing := [path for path in limits if path not in profile]:
                raise UserError(
                    f"must name all low-rank layers, got none of {missing}. Complete"
                    " it."
                )
    ordered = sorted(profiles, key=lambda p: sum(np.sum(rank) for rank in p.values()))
    for small, large in itertools.pairwise(ordered):
        higher = [
            path for path in limits if np.any(np.greater(small[path], large[path]))
        ]
        if higher:
            raise UserError(
                "family: profiles must be nested, got a smaller one with a higher"
                f" rank at {higher}. Lower it there."
            )
