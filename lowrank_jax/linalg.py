"""Linear algebra of factored matrices: arrays in, arrays out.

A matrix `W (i, o)` is the product `u (i, r) · diag(|s|) (r) · v (r, o)`; every function
takes any number of equal leading axes in front of these. Letters: `i` in, `o` out, `r`
rank.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def balanced_svd(
    matrix: Float[Array, "*stack i o"], rank: int
) -> tuple[Float[Array, "*stack i r"], Float[Array, "*stack r o"]]:
    """The best factors of one rank, with the singular values shared between the two.

    With `W = P S Q^T`, returns `P sqrt(S)` and `sqrt(S) Q^T`, cut at `rank` (Horvath et
    al., 2024, section 3; Eckart-Young makes the product the nearest of its rank).

    Args:
      matrix: The matrix to factor.
      rank: Number of columns to keep, at most min(i, o).

    >>> u, v = balanced_svd(jnp.diag(jnp.array([4.0, 1.0])), 1)
    >>> [float(x) for x in abs(u[:, 0])], [float(x) for x in abs(v[0])]
    ([2.0, 0.0], [2.0, 0.0])
    """
    u, s, v = truncated_svd(matrix, rank)
    root = jnp.sqrt(s)
    return u * root[..., None, :], root[..., :, None] * v


def truncated_svd(
    matrix: Float[Array, "*stack i o"], rank: int
) -> tuple[
    Float[Array, "*stack i r"], Float[Array, "*stack r"], Float[Array, "*stack r o"]
]:
    """The leading `rank` singular triplets, computed in float32 or better."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    u, s, v = jnp.linalg.svd(wide, full_matrices=False)
    kept = (u[..., :, :rank], s[..., :rank], v[..., :rank, :])
    return tuple(part.astype(matrix.dtype) for part in kept)


def canonical_form(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> tuple[
    Float[Array, "*stack i r"], Float[Array, "*stack r"], Float[Array, "*stack r o"]
]:
    """The singular value decomposition of `u diag(|s|) v`, without forming the product.

    QR of both factors, then an SVD of the small matrix `R_u diag(|s|) R_v^T`: O((i + o)
    r^2 + r^3). Every prefix of the result is the best approximation of its rank
    (Eckart-Young). Columns past min(i, o), if there are any, come out as zero.

    Returns:
      `u` with orthonormal columns, `s` in falling order, `v` with orthonormal rows.
    """
    rank = u.shape[-1]
    if rank == 0:
        return u, jnp.zeros(u.shape[:-2] + (0,), u.dtype), v
    wide = jnp.promote_types(u.dtype, jnp.float32)
    left = u.astype(wide) if s is None else (u * jnp.abs(s)[..., None, :]).astype(wide)
    q_u, r_u = jnp.linalg.qr(left)
    q_v, r_v = jnp.linalg.qr(jnp.swapaxes(v.astype(wide), -1, -2))
    p, sigma, z = jnp.linalg.svd(r_u @ jnp.swapaxes(r_v, -1, -2), full_matrices=False)
    left, right = q_u @ p, z @ jnp.swapaxes(q_v, -1, -2)
    missing = rank - sigma.shape[-1]
    lead = [(0, 0)] * (u.ndim - 2)
    left = jnp.pad(left, [*lead, (0, 0), (0, missing)])
    sigma = jnp.pad(sigma, [*lead, (0, missing)])
    right = jnp.pad(right, [*lead, (0, missing), (0, 0)])
    return left.astype(u.dtype), sigma.astype(u.dtype), right.astype(v.dtype)


def column_norms(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> tuple[Float[Array, "*stack r"], Float[Array, "*stack r"]]:
    """Squared norms of the columns of `u diag(|s|)` and of the rows of `v`."""
    left = jnp.sum(jnp.square(u), axis=-2)
    if s is not None:
        left = left * jnp.square(s)
    return left, jnp.sum(jnp.square(v), axis=-1)


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose gradient at 0 is 0 instead of infinite.

    A norm that is zero sits at its minimum; 0 is a subgradient there. The usual NaN
    (0 times infinity) would reach every column through the reverse sums of the lasso.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def tail_norms(squares: Float[Array, "*stack r"]) -> Float[Array, "*stack r"]:
    """`||X_{>=b}||_F` for every b, from the squared norms of the columns of X.

    Entry b (from 0) is the norm of columns b to the last; entry 0 is that of the whole
    X.
    """
    return safe_sqrt(jax.lax.cumsum(squares, axis=squares.ndim - 1, reverse=True))
