"""Products of two and more factors as chains of matrices, in NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factors import Factors


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers, as an initialiser too (which Flax calls with a key first)."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def chain_of(factors: Factors) -> list[np.ndarray]:
    """The matrices of the product, left to right, in float64."""
    u, middle, v = (
        np.asarray(part[...], np.float64)
        for part in (factors.u, factors.middle, factors.v)
    )
    return [u, *np.moveaxis(middle, -3, 0), v]


def product(factors: Factors, rank: Any) -> np.ndarray:
    """The chain of the leading `rank` columns and rows, matrix by matrix of a stack."""
    chain = chain_of(factors)
    ranks = np.broadcast_to(rank, factors.stack_shape)
    result = np.zeros((*factors.stack_shape, factors.in_size, factors.out_size))
    for index in np.ndindex(factors.stack_shape):
        u, *middle, v = (part[index] for part in chain)
        r = ranks[index]
        squares = [square[:r, :r] for square in middle]
        result[index] = np.linalg.multi_dot([u[:, :r], *squares, v[:r]])
    return result
