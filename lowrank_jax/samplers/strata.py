"""The full model and one size of each stratum, so that sizes of all kinds are trained
in every step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lowrank_jax.errors import UserError
from lowrank_jax.samplers.base import (
    Choice,
    RankSampler,
    SampledRanks,
    TableState,
    any_of,
    layer_keys,
    levels_at,
    of_rungs,
)

BETWEEN = ("nothing", "common", "layers")


def strata(
    *, fractions: Sequence[Sequence[float]], between: str = "nothing"
) -> RankSampler:
    """Takes the full model, then one size of each stratum, drawn anew each step.

    Strata of one size each are all sizes in every step (`matryoshka`); one stratum is
    one size beside the full model. With draws `between` the rungs every rank is
    trained, at the price of the rung above it.

    Args:
      fractions: Of the ranks, by stratum: each gives a pass, at one of its rungs, all
        equally likely; a fraction that comes twice is twice as likely.
      between: "nothing": the ranks are those of the rung. "common": between the next
        lower rung, without it, and this one, all layers at the same place of theirs.
        "layers": each layer anywhere between them. The lowest rung is always just that.

    Raises:
      UserError: No fraction, or one outside (0, 1); an unknown `between`.
    """
    flat = [fraction for stratum in fractions for fraction in stratum]
    if not flat or not all(fractions) or not all(0 < x < 1 for x in flat):
        raise UserError(
            "strata: fractions must hold at least one stratum, and each fractions in"
            f" (0, 1), got {fractions}. The full model is always there."
        )
    if between not in BETWEEN:
        raise UserError(
            f"strata: between must be one of {BETWEEN}, got {between!r}. Choose one."
        )
    rungs = sorted({1.0, *flat}, reverse=True)
    strata_rungs = [[rungs.index(x) for x in stratum] for stratum in fractions]

    def choose(state: TableState, key: PRNGKeyArray) -> list[Choice]:
        keys = jax.random.split(key, len(fractions))
        choices = [Choice((0,))]
        for among, key in zip(strata_rungs, keys, strict=True):
            choice = any_of(among, key)
            if between != "nothing":
                choice = choice._replace(ranks=ranks_below(choice, state, key))
            choices.append(choice)
        return choices

    def ranks_below(
        choice: Choice, state: TableState, key: PRNGKeyArray
    ) -> SampledRanks:
        key = jax.random.fold_in(key, 1)
        keys = layer_keys(key, state.tables)
        rung = jnp.asarray(choice.among)[choice.drawn]
        next_lower = jnp.minimum(rung + 1, len(rungs) - 1)
        ranks = {}
        for path, table in state.tables.items():
            high, low = table[rung], table[next_lower]
            common = between == "common"
            place = jax.random.uniform(
                key if common else keys[path], () if common else high.shape
            )
            ranks[path] = high - jnp.floor(place * (high - low)).astype(jnp.int32)
        return ranks

    return of_rungs(
        lambda model: levels_at(rungs, model),
        choose,
        passes=1 + len(fractions),
        full_first=True,
    )
