"""The full model and one size of each stratum, so that sizes of all kinds are trained
in every step."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.samplers.base import (
    Choice,
    RankSampler,
    SampledRanks,
    TableState,
    any_of,
    layer_keys,
    of_fractions,
)

BETWEEN = ("nothing", "common", "layers")


def strata(
    *,
    fractions: Sequence[Sequence[float]],
    between: str = "nothing",
    family: Family | str = (),
) -> RankSampler:
    """Takes the full model, then one size of each stratum, drawn anew each step.

    Strata of one size each are all sizes in every step (`matryoshka`); one stratum is
    one size beside the full model. With draws `between` the rungs every rank is
    trained, at the price of the rung above it.

    Args:
      fractions: Of the ranks, by stratum: each gives a pass, at one of its rungs, all
        equally likely; a fraction that comes twice is twice as likely.
      between: "nothing": the ranks are those of the rung. "common": from the next lower
        rung to this one, all layers at the same place between theirs. "layers": each
        layer at its own place, so that every way to round a fraction between them is
        trained. The lowest rung is always just that.
      family: As of `matryoshka`.

    Raises:
      UserError: No fraction, or one outside (0, 1); an unknown `between`.
    """
    _check(fractions, between)
    rungs = sorted({1.0, *itertools.chain(*fractions)}, reverse=True)
    strata_rungs = [[rungs.index(x) for x in stratum] for stratum in fractions]

    def choose(state: TableState, key: PRNGKeyArray) -> list[Choice]:
        keys = jax.random.split(key, len(fractions))
        choices = [Choice((0,))]
        for among, key in zip(strata_rungs, keys, strict=True):
            choice = any_of(among, key)
            if between != "nothing":
                choice = choice._replace(
                    ranks=_ranks_below(choice, state, key, common=between == "common")
                )
            choices.append(choice)
        return choices

    return of_fractions(rungs, choose, family=family, passes=1 + len(fractions))


def _ranks_below(
    choice: Choice, state: TableState, key: PRNGKeyArray, *, common: bool
) -> SampledRanks:
    """Draws ranks from those of the next lower rung to those of the chosen one."""
    key = jax.random.fold_in(key, 1)
    keys = layer_keys(key, state.tables)
    rung, ranks = jnp.asarray(choice.among)[choice.drawn], {}
    for path, table in state.tables.items():
        high, low = table[rung], table[jnp.minimum(rung + 1, len(table) - 1)]
        place = jax.random.uniform(
            key if common else keys[path], () if common else high.shape
        )
        drawn = low + jnp.floor(place * (high - low + 1)).astype(jnp.int32)
        ranks[path] = jnp.minimum(drawn, high)
    return ranks


def _check(fractions: Sequence[Sequence[float]], between: str) -> None:
    flat = [*itertools.chain(*fractions)]
    if not flat or not all(fractions) or not all(0 < x < 1 for x in flat):
        raise UserError(
            "strata: fractions must hold at least one stratum, and each fractions in"
            f" (0, 1), got {fractions}. The full model is always there."
        )
    if between not in BETWEEN:
        raise UserError(
            f"strata: between must be one of {BETWEEN}, got {between!r}. Choose one."
        )
