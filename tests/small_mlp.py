"""A small low-rank model, batches for it, and many draws of ranks by a sampler."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import factorization, samplers
from train.models.mlp import MLP

FULL_RANKS = {"head": 3, "hidden/0": 6}


@functools.cache
def original() -> nnx.Module:
    return factorization.factorize(MLP(16, (6,), 3, rngs=nnx.Rngs(0)))


@pytest.fixture
def small_model() -> nnx.Module:
    """16 -> 6 -> 3 in low-rank form; arrays of its own, since a step donates them."""
    graphdef, state = nnx.split(original())
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def batch(seed: int, size: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 4, 4, 1)).astype(np.float32)
    labels = rng.integers(0, 3, size=size, dtype=np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def make_draw(sampler: samplers.RankSampler, count: int) -> Callable[..., Any]:
    """A jitted function from state, seed and first step to the next ranks and state."""

    @jax.jit
    def draw(state: Any, seed: int, start: int) -> tuple[dict[str, jax.Array], Any]:
        def body(state, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            ranks, state = sampler.sample(state, key, number)
            return state, ranks

        state, ranks = jax.lax.scan(body, state, start + jnp.arange(count))
        return ranks, state

    return draw
