"""Samplers that draw ranks from a distribution, one for each layer or for all."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks
from lowrank_jax.samplers.base import (
    Choice,
    LimitsState,
    ModelOrRanks,
    RankSampler,
    SampledRanks,
    init_limits,
    layer_keys,
    limits_of,
    ranks_at,
    round_up,
)
from lowrank_jax.samplers.levels import one_level


def full() -> RankSampler:
    """Takes every layer at its full rank: plain training of the factors."""

    def sample(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, LimitsState]:
        del key, step
        return state.limits, state

    def rungs(model: ModelOrRanks) -> list[Ranks]:
        return [{path: limits.active for path, limits in limits_of(model).items()}]

    def choose(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[list[Choice], LimitsState]:
        del key, step
        return [Choice((0,))], state

    return RankSampler(init_limits, sample, full_first=True, rungs=rungs, choose=choose)


def independent() -> RankSampler:
    """Draws a rank for each layer, uniform in 1 to its full rank."""

    def sample(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, LimitsState]:
        del step
        keys = layer_keys(key, state.limits)
        ranks = {
            path: _uniform(keys[path], limit, limit.shape)
            for path, limit in state.limits.items()
        }
        return ranks, state

    return RankSampler(init_limits, sample)


def geometric(*, decay: float) -> RankSampler:
    """Draws rank b with a chance that falls as decay^b (Rippel et al., 2014).

    The draw is independent for each layer; what lies past the full rank is given to it,
    so that the full model is trained as well.

    Args:
      decay: Ratio of the chances of two neighbouring ranks, in (0, 1).
    """
    if not 0 < decay < 1:
        raise UserError(
            f"geometric: decay must be in (0, 1), got {decay}. Give one between them."
        )

    def sample(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, LimitsState]:
        del step
        keys = layer_keys(key, state.limits)

        def draw(
            key: PRNGKeyArray, limit: Int[Array, "*stack"]
        ) -> Int[Array, "*stack"]:
            uniform = jax.random.uniform(key, limit.shape, minval=1e-7, maxval=1.0)
            rank = 1 + jnp.floor(jnp.log(uniform) / np.log(decay)).astype(jnp.int32)
            return jnp.minimum(rank, limit)

        ranks = {path: draw(keys[path], limit) for path, limit in state.limits.items()}
        return ranks, state

    return RankSampler(init_limits, sample)


def uniform_fraction(*, fractions: Sequence[float] = ()) -> RankSampler:
    """Draws one fraction p for all layers, rank ceil(p r) (Horvath et al., 2021).

    Args:
      fractions: The levels to draw from, such as (0.2, 0.4, 0.6, 0.8, 1.0). Empty: p is
        uniform in (0, 1].
    """
    if fractions:
        return one_level(fractions)

    def sample(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, LimitsState]:
        del step
        return ranks_at(jax.random.uniform(key), state.limits), state

    return RankSampler(init_limits, sample)


def per_example(*, batch_size: int, common_fraction: bool = False) -> RankSampler:
    """Draws a rank for each example of the batch, uniform in 1 to the full one.

    Layers run in the factored order then, since the examples share no merged matrix.

    Args:
      batch_size: Examples in a batch; the first axis of every layer's input.
      common_fraction: Draw one fraction per example for all layers, instead of one rank
        per example and layer.
    """
    if batch_size < 1:
        raise UserError(
            f"per_example: batch_size must be at least 1, got {batch_size}. Raise it."
        )

    def sample(
        state: LimitsState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, LimitsState]:
        del step
        keys, ranks = layer_keys(key, state.limits), {}
        fractions = jax.random.uniform(key, (batch_size,))
        for path, limit in state.limits.items():
            limit = limit[..., None]
            if common_fraction:
                shared = fractions.reshape(*[1] * (limit.ndim - 1), batch_size)
                ranks[path] = round_up(shared, limit)
            else:
                shape = (*limit.shape[:-1], batch_size)
                ranks[path] = _uniform(keys[path], limit, shape)
        return ranks, state

    return RankSampler(init_limits, sample, per_example=True)


def _uniform(
    key: PRNGKeyArray, limit: Int[Array, "..."], shape: Sequence[int]
) -> Int[Array, "..."]:
    """Draws whole numbers in 1 to the limit, 0 where that is 0."""
    draw = jax.random.randint(key, shape, 1, jnp.maximum(limit, 1) + 1)
    return jnp.minimum(draw, limit)
