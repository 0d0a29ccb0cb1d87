"""What each rank of each layer keeps: curves from factors, as plain numbers."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank_jax import linalg
from lowrank_jax.factors import Factors


def column_importances(
    factors: Mapping[str, Factors],
) -> dict[str, Float[np.ndarray, "*stack r"]]:
    """`||u_b|| ||v_b||` of each allocated column, `|s_b|` included where there is
    one."""
    importances = {}
    for path, one in factors.items():
        left, right = linalg.column_norms(*one.arrays())
        product = np.asarray(left, np.float64) * np.asarray(right, np.float64)
        importances[path] = np.sqrt(product)
    return importances


def stable_ranks(
    matrices: Mapping[str, Float[Array, "*stack i o"]],
) -> dict[str, Float[np.ndarray, "*stack"]]:
    """`||W||_F^2 / ||W||_2^2` of each matrix; 0 for W = 0."""
    ranks = {}
    for path, matrix in matrices.items():
        wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        squares = np.square(np.asarray(jnp.linalg.svd(wide, compute_uv=False)))
        first = squares[..., :1].sum(axis=-1)
        ranks[path] = squares.sum(axis=-1) / np.where(first > 0, first, 1)
    return ranks
