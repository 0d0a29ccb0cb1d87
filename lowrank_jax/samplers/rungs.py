"""A ladder: each layer draws its own rung, after a warm-up at the full ranks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from lowrank_jax.errors import UserError
from lowrank_jax.samplers.base import (
    ModelOrRanks,
    RankSampler,
    SampledRanks,
    TableState,
    init_limits,
    is_cut,
    layer_keys,
    table_at,
)


def ladder(
    *, fractions: Sequence[float], chances: Sequence[float], warmup_steps: int
) -> RankSampler:
    """Draws a rung for each layer, with given chances; first the full one.

    The rungs are fixed when training begins: a cut lowers those above the new rank to
    it and leaves the others. Where layers came or went, or a rank was raised, they are
    made anew. Each matrix of a stack draws for itself.

    Args:
      fractions: The rungs, rank ceil(p r) for each p in (0, 1]; one of them is 1.
      chances: How likely each rung is, in the same order; they add up to 1.
      warmup_steps: For so many steps of the phase every layer runs at its full rank.
    """
    if 1 not in fractions or len(fractions) != len(chances):
        raise UserError(
            "ladder: fractions must hold 1, and chances as many numbers, got"
            f" {tuple(fractions)} and {tuple(chances)}. Give one chance a rung."
        )
    if min(chances) < 0 or abs(sum(chances) - 1) > 1e-6:
        raise UserError(
            "ladder: chances must be at least 0 and add up to 1, got"
            f" {tuple(chances)}. Divide them by their sum."
        )
    if warmup_steps < 0:
        raise UserError(
            f"ladder: warmup_steps must be at least 0, got {warmup_steps}. Raise it."
        )
    top = list(fractions).index(1)

    def sample(
        state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, TableState]:
        keys, ranks = layer_keys(key, state.tables), {}
        logits = jnp.log(jnp.asarray(chances, jnp.float32))
        for path, table in state.tables.items():
            rung = jax.random.categorical(keys[path], logits, shape=table.shape[1:])
            rung = jnp.where(jnp.asarray(step) < warmup_steps, top, rung)
            ranks[path] = jnp.take_along_axis(table, rung[None], axis=0)[0]
        return ranks, state

    def keep(state: TableState, model: ModelOrRanks) -> TableState:
        limits = init_limits(model).limits
        if not is_cut(limits, {p: table[top] for p, table in state.tables.items()}):
            return table_at(fractions, model)
        return TableState(
            {
                path: jnp.asarray(np.minimum(table, limits[path][None]), jnp.int32)
                for path, table in state.tables.items()
            }
        )

    return RankSampler(lambda model: table_at(fractions, model), sample, keep=keep)
