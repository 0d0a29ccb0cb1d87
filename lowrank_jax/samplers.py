"""Ordered dropout: samplers of ranks for nested training.

A sampler is a pair of pure functions: `init(max_ranks) -> state` and `sample(state,
key) -> (ranks, state)`, traced inside the training step. Its state is saved with the
checkpoint and made anew whenever ranks are cut. Ranks come as `{path: int32 array}`,
ready for `set_ranks`: of the shape of the layer's active rank, with a trailing batch
axis for one rank per example, and with a leading axis of `passes` where a step makes
several.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, at_fraction, fraction_of

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

    tables: dict[str, Int[Array, "..."]]  # (level, *stack)


def full() -> RankSampler:
    """Every layer at its allocated rank: plain training of the factors."""

    def sample(state: LimitsState, key: PRNGKeyArray):
        return state.max_ranks, state

    return RankSampler(_init_limits, sample, full_first=True)


def single_layer() -> RankSampler:
    """One layer at a time, as in Maestro (Horvath et al., 2024, section 3.2).

    Each step takes one pair (layer, rank), uniformly over all of them and without
    replacement within a shuffled pass; that layer runs at the rank, all others at full.
    So a layer is chosen in proportion to its rank. Each matrix of a stack is a layer
    here.
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

    The draw is independent for each layer; what lies past the allocated rank is given
    to it, so that the full model is trained as well.

    Args:
      decay: Ratio of the chances of two neighbouring ranks, in (0, 1).
    """
    if not 0 < decay < 1:
        raise UserError(f"geometric: decay must be in (0, 1), got {decay}.")

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
        return _one_level(lambda max_ranks: _table(fractions, max_ranks))

    def sample(state: LimitsState, key: PRNGKeyArray):
        return _ranks_at(jax.random.uniform(key), state.max_ranks), state

    return RankSampler(_init_limits, sample)


def sandwich(*, passes: int = 4, smallest: float = 0.125) -> RankSampler:
    """The full model, the smallest, and random ones between (US-Nets, Yu & Huang,
    2019).

    Args:
      passes: Forward passes a step, at least 2: full, smallest, and passes - 2 with one
        uniformly random fraction in (smallest, 1] for all layers.
      smallest: The smallest fraction of the ranks, in (0, 1].
    """
    fraction_of(smallest, 1)
    if passes < 2:
        raise UserError(f"sandwich: passes must be at least 2, got {passes}.")

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
      fractions: Fractions of the ranks, one pass each; 1 and at least one more.
    """
    levels = sorted(set(fractions), reverse=True)
    if len(levels) < 2 or levels[0] != 1:
        raise UserError(
            "matryoshka: fractions must hold 1 and a smaller one, got"
            f" {tuple(fractions)}. Use the sampler full for one level."
        )

    def sample(state: TableState, key: PRNGKeyArray):
        return state.tables, state

    return RankSampler(
        lambda max_ranks: _table(levels, max_ranks),
        sample,
        passes=len(levels),
        full_first=True,
    )


def family(*, profiles: Sequence[Ranks]) -> RankSampler:
    """One of a family's nested profiles each step, all equally often on average.

    Args:
      profiles: Rank mappings, each with all layers, from large to small or the reverse;
        from one to the next smaller every rank falls or stays.
    """
    if not profiles:
        raise UserError("family: profiles must hold at least one, got none.")

    def init(max_ranks: Ranks) -> TableState:
        limits = _init_limits(max_ranks).max_ranks
        _check_family(profiles, max_ranks)
        tables = {
            path: [jnp.broadcast_to(jnp.int32(p[path]), limit.shape) for p in profiles]
            for path, limit in limits.items()
        }
        return TableState({path: jnp.stack(rows) for path, rows in tables.items()})

    return _one_level(init)


def per_example(*, batch_size: int, common_fraction: bool = False) -> RankSampler:
    """A rank of its own for each example of the batch, uniform in 1 to the allocated
    one.

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
                shared = fractions.reshape(*[1] * (limit.ndim - 1), batch_size)
                ranks[path] = _round_up(shared, limit)
            else:
                shape = (*limit.shape[:-1], batch_size)
                ranks[path] = _uniform(keys[path], limit, shape)
        return ranks, state

    return RankSampler(_init_limits, sample, per_example=True)


def _init_limits(max_ranks: Ranks) -> LimitsState:
    return LimitsState(
        {path: jnp.asarray(r, jnp.int32) for path, r in max_ranks.items()}
    )


def _one_level(init: Callable[[Ranks], TableState]) -> RankSampler:
    """One row of the table each step, all rows equally likely."""

    def sample(state: TableState, key: PRNGKeyArray):
        rows = jax.tree.leaves(state.tables)[0].shape[0] if state.tables else 1
        level = jax.random.randint(key, (), 0, rows)
        return {path: table[level] for path, table in state.tables.items()}, state

    return RankSampler(init, sample)


def _table(fractions: Sequence[float], max_ranks: Ranks) -> TableState:
    """The exact ranks at each fraction, so that no rounding happens under jit."""
    rows = [at_fraction(max_ranks, fraction) for fraction in fractions]
    return TableState(
        {
            path: jnp.asarray([row[path] for row in rows], jnp.int32)
            for path in max_ranks
        }
    )


def _ranks_at(
    fraction: Float[Array, ""], limits: Mapping[str, Int[Array, "*stack"]]
) -> SampledRanks:
    return {path: _round_up(fraction, limit) for path, limit in limits.items()}


def _round_up(
    fraction: Float[Array, "..."], limit: Int[Array, "..."]
) -> Int[Array, "..."]:
    """ceil(fraction * limit) for a random fraction, at least 1 where there is a
    rank."""
    rank = jnp.ceil(fraction * limit).astype(jnp.int32)
    return jnp.clip(rank, jnp.minimum(limit, 1), limit)


def _uniform(
    key: PRNGKeyArray, limit: Int[Array, "..."], shape: Sequence[int]
) -> Int[Array, "..."]:
    """Whole numbers in 1 to the limit, 0 where that is 0."""
    draw = jax.random.randint(key, shape, 1, jnp.maximum(limit, 1) + 1)
    return jnp.minimum(draw, limit)


def _keys(key: PRNGKeyArray, paths: Mapping[str, Any]) -> dict[str, PRNGKeyArray]:
    return {path: jax.random.fold_in(key, n) for n, path in enumerate(paths)}


def _check_family(profiles: Sequence[Ranks], max_ranks: Ranks) -> None:
    for profile in profiles:
        if set(profile) != set(max_ranks):
            raise UserError(
                f"family: every profile must name the layers {sorted(max_ranks)}, got"
                f" {sorted(profile)}. Complete it."
            )
        for path, limit in max_ranks.items():
            rank = np.asarray(profile[path])
            if (rank < 0).any() or (rank > np.asarray(limit)).any():
                raise UserError(
                    f"{path}: rank must be in [0, {limit}], got {profile[path]}. Lower"
                    " it in the family's profiles."
                )
    ordered = sorted(profiles, key=lambda p: sum(np.sum(r) for r in p.values()))
    for small, large in itertools.pairwise(ordered):
        wrong = [
            path
            for path in max_ranks
            if (np.asarray(small[path]) > np.asarray(large[path])).any()
        ]
        if wrong:
            raise UserError(
                "family: profiles must be nested, got a smaller one with a higher"
                f" rank at {wrong}. Lower it there."
            )


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
