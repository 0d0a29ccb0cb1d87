"""One layer at a time, as in Maestro: a shuffled pass over all (layer, rank) pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from lowrank_jax.samplers.base import (
    ModelOrRanks,
    RankSampler,
    SampledRanks,
    init_limits,
    is_cut,
)


class SingleLayerState(NamedTuple):
    """A shuffled pass over all (layer, rank) pairs and the place in it."""

    limits: dict[str, Int[Array, "*stack"]]
    layers: Int[Array, " n"]
    ranks: Int[Array, " n"]
    order: Int[Array, " n"]
    position: Int[Array, ""]


def single_layer() -> RankSampler:
    """Draws one layer at a time, as Maestro (Horvath et al., 2024, section 3.2).

    Each step takes one pair (layer, rank), uniformly over all of them and without
    replacement within a shuffled pass; that layer runs at the rank, all others at full.
    So a layer is chosen in proportion to its rank. Each matrix of a stack is a layer
    here.

    Over a cut the pass goes on: the pairs that are left keep their order, those that
    were taken count as taken, and a pass still takes each of its pairs once. Where
    layers came or went, or a rank was raised, a new pass begins.
    """
    return RankSampler(_init, _sample, keep=_keep)


def _init(model: ModelOrRanks) -> SingleLayerState:
    limits = init_limits(model).limits
    sizes = _sizes(limits)
    layers = np.repeat(np.arange(len(sizes)), sizes)
    ranks = np.concatenate([np.zeros(0, int), *(np.arange(n) + 1 for n in sizes)])
    total = len(ranks)
    return SingleLayerState(
        limits,
        jnp.asarray(layers, jnp.int32),
        jnp.asarray(ranks, jnp.int32),
        jnp.arange(total, dtype=jnp.int32),
        jnp.int32(total),  # the first sample shuffles
    )


def _sample(
    state: SingleLayerState, key: PRNGKeyArray, step: Int[Array, ""] | int
) -> tuple[SampledRanks, SingleLayerState]:
    del step
    total = state.order.size
    if total == 0:  # everything has been cut to rank 0
        return state.limits, state
    order, position = jax.lax.cond(
        state.position >= total,
        lambda: (jax.random.permutation(key, state.order), jnp.int32(0)),
        lambda: (state.order, state.position),
    )
    pair = order[position]
    chosen, first = {}, 0
    for path, limit in state.limits.items():
        index = first + jnp.arange(limit.size, dtype=jnp.int32).reshape(limit.shape)
        hit = index == state.layers[pair]
        chosen[path] = jnp.where(hit, state.ranks[pair], limit)
        first += limit.size
    return chosen, state._replace(order=order, position=position + 1)


def _keep(state: SingleLayerState, model: ModelOrRanks) -> SingleLayerState:
    new = _init(model)
    if not is_cut(new.limits, state.limits):
        return new
    sizes = _sizes(new.limits)
    # Pairs are listed by layer, then rank: a pair that is left has its rank's place
    # after the first pair of its layer, in the new list as in the old one.
    left: Bool[np.ndarray, " n"] = np.asarray(state.ranks) <= sizes[state.layers]
    place = np.cumsum(left) - 1
    order = np.asarray(state.order)
    taken = left[order[: int(state.position)]].sum()
    return new._replace(
        order=jnp.asarray(place[order[left[order]]], jnp.int32),
        position=jnp.asarray(taken, jnp.int32),
    )


def _sizes(limits: dict[str, Int[Array, "*stack"]]) -> Int[np.ndarray, " n"]:
    """Lists the rank of each matrix of each layer."""
    return np.concatenate(
        [np.zeros(0, int), *(np.asarray(limit).ravel() for limit in limits.values())]
    )
