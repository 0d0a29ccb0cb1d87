"""Samplers over levels that are fixed when they are made for a model."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from lowrank_jax import families
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.ranks import Limits, Ranks, fraction_of
from lowrank_jax.samplers.base import (
    Choice,
    ModelOrRanks,
    RankSampler,
    TableState,
    any_of,
    levels_at,
    limits_of,
    of_fractions,
    of_rungs,
    ranks_at,
)

MOST_PASSES = 64
"""Of a step: each is a forward and a backward pass of its own in its program."""


def one_level(fractions: Sequence[float]) -> RankSampler:
    """Draws one of these fractions for all layers, all equally often."""
    return of_rungs(lambda model: levels_at(fractions, model), _any_rung)


def sandwich(
    *, passes: int = 4, smallest: float = 0.125, fractions: Sequence[float] = ()
) -> RankSampler:
    """Takes the full model, the smallest, random ones between (Yu & Huang, 2019).

    Args:
      passes: Forward passes a step, at least 2: full, smallest, and passes - 2 with one
        random fraction for all layers.
      smallest: The smallest fraction of the ranks, in (0, 1].
      fractions: What the random ones are drawn from, all equally often. Empty: any in
        (smallest, 1], equally likely.
    """
    fraction_of(smallest, 1)
    if not 2 <= passes <= MOST_PASSES:
        raise UserError(
            f"sandwich: passes must be in [2, {MOST_PASSES}], got {passes}. Correct it."
        )

    def choose(state: TableState, key: PRNGKeyArray) -> list[Choice]:
        ends = [Choice((0,)), Choice((1,))]
        if fractions:
            among, keys = range(2, 2 + len(fractions)), jax.random.split(key, passes)
            return [*ends, *(any_of(among, key) for key in keys[2:])]
        limits = {path: table[0] for path, table in state.tables.items()}
        random = jax.random.uniform(key, (passes - 2,), minval=smallest, maxval=1.0)
        return [*ends, *(Choice(ranks=ranks_at(p, limits)) for p in random)]

    return of_rungs(
        lambda model: levels_at([1.0, smallest, *fractions], model),
        choose,
        passes=passes,
        full_first=True,
    )


def matryoshka(*, fractions: Sequence[float], family: Family | str = ()) -> RankSampler:
    """Takes all levels in every step, the full one first (Kusupati et al., 2022).

    Args:
      fractions: Fractions of the ranks, one pass each; 1 and at least one more.
      family: What they stand for: pairs of a fraction and ranks, see `families`, or
        "selected", the family that an action chose; empty for one fraction of every
        rank.
    """
    levels = sorted(set(fractions), reverse=True)
    if len(levels) < 2 or levels[0] != 1:
        raise UserError(
            "matryoshka: fractions must hold 1 and a smaller one, got"
            f" {tuple(fractions)}. Use the sampler full for one level."
        )
    return of_fractions(
        levels,
        lambda state, key: [Choice((number,)) for number in range(len(levels))],
        family=family,
        passes=len(levels),
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

    def rungs(model: ModelOrRanks) -> list[Ranks]:
        limits = limits_of(model)
        lowered = [families.lowered(profile, limits) for profile in profiles]
        _check_profiles(lowered, limits)
        return [
            {
                path: np.broadcast_to(profile[path], limits[path].stack).tolist()
                for path in limits
            }
            for profile in lowered
        ]

    return of_rungs(rungs, _any_rung)._replace(check=check)


def _any_rung(state: TableState, key: PRNGKeyArray) -> list[Choice]:
    """One rung, all of them equally likely."""
    rungs = jax.tree.leaves(state.tables)[0].shape[0] if state.tables else 1
    return [any_of(range(rungs), key)]


def _check_profiles(profiles: Sequence[Ranks], limits: Mapping[str, Limits]) -> None:
    """Checks profiles in either order."""
    named = {f"family.profiles[{n}]": profile for n, profile in enumerate(profiles)}
    families.check_profiles(named, limits)
    families.check_nested(
        sorted(profiles, key=lambda p: sum(np.sum(rank) for rank in p.values()))
    )
