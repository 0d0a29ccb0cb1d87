"""Ordered dropout: samplers of ranks for nested training.

A sampler is a pair of pure functions: `init(max_ranks) -> state` and `sample(state, key) ->
(ranks, state)`, traced inside the training step. Its state is saved with the checkpoint and
made anew whenever ranks are cut. Ranks come as `{path: int32 array}`, ready for `set_ranks`:
of the shape of the layer's active rank, with a trailing batch axis for one rank per example,
and with a leading axis of `passes` where a step makes several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lowrank_jax.cost import fraction_of
from lowrank_jax.surgery import Ranks

SampledRanks: TypeAlias = dict[str, Int[Array, "..."]]


class RankSampler(NamedTuple):
    """Ranks for each step.

    Args:
      init: Makes the state for these allocated ranks (a pytree of arrays).
      sample: Draws the ranks of one step.
      passes: Forward passes per step; more than one puts a leading axis on the ranks.
      full_first: Whether the first pass always runs at the allocated ranks.
      per_example: Whether the ranks carry a trailing batch axis.
    """

    init: Callable[[Ranks], Any]
    sample: Callable[[Any, PRNGKeyArray], tuple[SampledRanks, Any]]
    passes: int = 1
    full_first: bool = False
    per_example: bool = False


class LimitsState(NamedTuple):
    """The allocated ranks, for samplers that remember nothing else."""

    max_ranks: dict[str, Int[Array, "*stack"]]


class SingleLayerState(NamedTuple):
    """A shuffled pass over all (layer, rank) pairs and the place in it."""

    max_ranks: dict[str, Int[Array, "*stack"]]
    layers: Int[Array, " n"]
    ranks: Int[Array, " n"]
    order: Int[Array, " n"]
    position: Int[Array, ""]


class TableState(NamedTuple):
    """Ranks of each layer at each of a list of levels."""

    tables: dict[str, Int[Array, "l *stack"]]


def full() -> RankSampler:
    """Every layer at its allocated rank: plain training of the factors."""

    def sample(state: LimitsState, key: PRNGKeyArray):
        return state.max_ranks, state

    return RankSampler(_init_limits, sample, full_first=True)


def single_layer() -> RankSampler:
    """One layer at a time, as in Maestro (Horvath et al., 2024, section 3.2).

    Each step takes one pair (layer, rank), uniformly over all of them and without
    replacement within a shuffled pass; that layer runs at the rank, all others at full. So
    a layer is chosen in proportion to its rank. Each matrix of a stack is a layer here.
    """

    def init(max_ranks: Ranks) -> SingleLayerState:
        limits = _init_limits(max_ranks).max_ranks
        sizes = np.concatenate(
            [np.zeros(0, int), *(np.asarray(r).ravel() for r in max_ranks.values())]
        )
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

    def sample(state: SingleLayerState, key: PRNGKeyArray):
        total = state.order.size
        if total == 0:  # everything has been cut to rank 0
            return state.max_ranks, state
        order, position = jax.lax.cond(
            state.position >= total,
            lambda: (jax.random.permutation(key, state.order), jnp.int32(0)),
            lambda: (state.order, state.position),
        )
        pair = order[position]
        chosen, ranks, first = {}, state.max_ranks, 0
        for path, limit in ranks.items():
            index = first + jnp.arange(limit.size, dtype=jnp.int32).reshape(limit.shape)
            hit = index == state.layers[pair]
            chosen[path] = jnp.where(hit, state.ranks[pair], limit)
            first += limit.size
        return chosen, state._replace(order=order, position=position + 1)

    return RankSampler(init, sample)


def independent() -> RankSampler:
    """Every layer at a rank of its own, uniform in 1 to its allocated rank."""

    def sample(state: LimitsState, key: PRNGKeyArray):
        keys = _keys(key, state.max_ranks)
        ranks = {
            path: _uniform(keys[path], limit, limit.shape)
            for path, limit in state.max_ranks.items()
        }
        return ranks, state

    return RankSampler(_init_limits, sample)


def geometric(*, decay: float) -> RankSampler:
    """Nested dropout (Rippel et al., 2014): rank b with a chance that falls as decay^b.

    The draw is independent for each layer; what lies past the allocated rank is given to
    it, so that the full model is trained as well.

    Args:
      decay: Ratio of the chances of two neighbouring ranks, in (0, 1).
    """
    if not 0 < decay < 1:
        raise ValueError(f"geometric: decay must be in (0, 1), got {decay}.")

    def sample(state: LimitsState, key: PRNGKeyArray):
        keys = _keys(key, state.max_ranks)

        def draw(key: PRNGKeyArray, limit: Int[Array, "*stack"]):
            uniform = jax.random.uniform(key, limit.shape, minval=1e-7, maxval=1.0)
            rank = 1 + jnp.floor(jnp.log(uniform) / np.log(decay)).astype(jnp.int32)
            return jnp.minimum(rank, limit)

        limits = state.max_ranks
        return {path: draw(keys[path], limits[path]) for path in limits}, state

    return RankSampler(_init_limits, sample)


def uniform_fraction(*, fractions: Sequence[float] = ()) -> RankSampler:
    """One fraction p for all layers, rank ceil(p r) (FjORD, Horvath et al., 2021).

    Args:
      fractions: The levels to draw from, such as (0.2, 0.4, 0.6, 0.8, 1.0). Empty: p is
        uniform in (0, 1].
    """
    if fractions:
        return _levels(fractions, passes=1, always=())

    def sample(state: LimitsState, key: PRNGKeyArray):
        return _ranks_at(jax.random.uniform(key), state.max_ranks), state

    return RankSampler(_init_limits, sample)


def sandwich(*, passes: int = 4, smallest: float = 0.125) -> RankSampler:
    """The full model, the smallest, and random ones between (US-Nets, Yu & Huang, 2019).

    Args:
      passes: Forward passes a step, at least 2: full, smallest, and passes - 2 with one
        uniformly random fraction in (smallest, 1] for all layers.
      smallest: The smallest fraction of the ranks, in (0, 1].
    """
    fraction_of(smallest, 1)
    if passes < 2:
        raise ValueError(f"sandwich: passes must be at least 2, got {passes}.")

    def init(max_ranks: Ranks) -> TableState:
        return _table([1.0, smallest], max_ranks)

    def sample(state: TableState, key: PRNGKeyArray):
        limits = {path: table[0] for path, table in state.tables.items()}
        random = jax.random.uniform(key, (passes - 2,), minval=smallest, maxval=1.0)
        middle = [_ranks_at(fraction, limits) for fraction in random]
        ranks = {
            path: jnp.concatenate(
                [table, *(draw[path][None] for draw in middle)], axis=0
            )
            for path, table in state.tables.items()
        }
        return ranks, state

    return RankSampler(init, sample, passes=passes, full_first=True)


def matryoshka(*, fractions: Sequence[float]) -> RankSampler:
    """All levels in every step, the full one first (Kusupati et al., 2022).

    Args:
      fractions: Fractions of the ranks, one pass each; 1 must be among them.
    """
    if 1 not in fractions:
        raise ValueError(f"matryoshka: fractions must hold 1, got {tuple(fractions)}.")
    levels = sorted(set(fractions), reverse=True)

    def sample(state: TableState, key: PRNGKeyArray):
        return state.tables, state

    return RankSampler(
        lambda max_ranks: _squeeze_single(_table(levels, max_ranks), len(levels)),
        sample,
        passes=len(levels),
        full_first=True,
    )


def family(*, profiles: Sequence[Ranks]) -> RankSampler:
    """One of a family's nested profiles each step, all equally often on average.

    Args:
      profiles: Rank mappings, each for all layers, every rank falling (or staying) from
        one profile to the next smaller.
    """
    profiles = [dict(profile) for profile in profiles]
    if not profiles:
        raise ValueError("family: profiles must hold at least one, got none.")

    def init(max_ranks: Ranks) -> TableState:
        _check_family(profiles, max_ranks)
        return TableState(
            {
                path: jnp.stack(
                    [
                        jnp.broadcast_to(
                            jnp.asarray(profile[path], jnp.int32), np.shape(limit)
                        )
                        for profile in profiles
                    ]
                )
                for path, limit in max_ranks.items()
            }
        )

    def sample(state: TableState, key: PRNGKeyArray):
        level = jax.random.randint(key, (), 0, len(profiles))
        return {path: table[level] for path, table in state.tables.items()}, state

    return RankSampler(init, sample)


def per_example(*, batch_size: int, common_fraction: bool = False) -> RankSampler:
    """A rank of its own for each example of the batch, uniform in 1 to the allocated one.

    Layers run in the factored order then, since the examples share no merged matrix.

    Args:
      batch_size: Examples in a batch; the first axis of every layer's input.
      common_fraction: Draw one fraction per example for all layers, instead of one rank
        per example and layer.
    """

    def sample(state: LimitsState, key: PRNGKeyArray):
        keys, ranks = _keys(key, state.max_ranks), {}
        fractions = jax.random.uniform(key, (batch_size,))
        for path, limit in state.max_ranks.items():
            limit = limit[..., None]
            if common_fraction:
                ranks[path] = _round_up(fractions, limit)
            else:
                shape = (*limit.shape[:-1], batch_size)
                ranks[path] = _uniform(keys[path], limit, shape)
        return ranks, state

    return RankSampler(_init_limits, sample, per_example=True)


def fraction_ranks(max_ranks: Ranks, fraction: float) -> dict[str, Any]:
    """Each allocated rank times a fraction, rounded up: `{path: int | list}`."""
    return {
        path: np.vectorize(lambda rank: fraction_of(fraction, int(rank)), otypes=[int])(
            np.asarray(limit)
        ).tolist()
        for path, limit in max_ranks.items()
    }


def _levels(
    fractions: Sequence[float], *, passes: int, always: Sequence[float]
) -> RankSampler:
    raise NotImplementedError


SAMPLERS: dict[str, Callable[..., RankSampler]] = {
    sampler.__name__: sampler
    for sampler in (
        full,
        single_layer,
        independent,
        geometric,
        uniform_fraction,
        sandwich,
        matryoshka,
        family,
        per_example,
    )
}
"""The samplers by the name they have in configs."""
