"""Linear algebra of factored matrices: arrays in, arrays out.

A matrix `W (i, o)` is the product `u (i, r) · diag(|s|) (r) · v (r, o)`; every function
takes any number of equal leading axes in front of these. Letters: `i` in, `o` out, `r`
rank. Where a result would suffer, products are computed in full float32, also on
accelerators whose default is less (TF32, bfloat16).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lowrank_jax import placement


def truncated_svd(
    matrix: Float[Array, "*stack i o"], rank: int
) -> tuple[
    Float[Array, "*stack i r"], Float[Array, "*stack r"], Float[Array, "*stack r o"]
]:
    """Returns the leading `rank` singular triplets, computed in float32 or better."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    wide = placement.whole(wide)
    u, s, v = jnp.linalg.svd(wide, full_matrices=False)
    kept = (u[..., :, :rank], s[..., :rank], v[..., :rank, :])
    u, s, v = (part.astype(matrix.dtype) for part in kept)
    return u, s, v


def canonical_form(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> tuple[
    Float[Array, "*stack i r"], Float[Array, "*stack r"], Float[Array, "*stack r o"]
]:
    """Returns the singular value decomposition of `u diag(|s|) v`, never formed.

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
    q_u, r_u = jnp.linalg.qr(placement.whole(left))
    q_v, r_v = jnp.linalg.qr(jnp.swapaxes(placement.whole(v.astype(wide)), -1, -2))
    core = exact_product(r_u, jnp.swapaxes(r_v, -1, -2))
    p, sigma, z = jnp.linalg.svd(core, full_matrices=False)
    left, right = exact_product(q_u, p), exact_product(z, jnp.swapaxes(q_v, -1, -2))
    missing = rank - sigma.shape[-1]
    lead = [(0, 0)] * (u.ndim - 2)
    left = jnp.pad(left, [*lead, (0, 0), (0, missing)])
    sigma = jnp.pad(sigma, [*lead, (0, missing)])
    right = jnp.pad(right, [*lead, (0, missing), (0, 0)])
    return left.astype(u.dtype), sigma.astype(u.dtype), right.astype(v.dtype)


def singular_values(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> Float[Array, "*stack n"]:
    """Returns the n = min(i, r, o) singular values of `u diag(|s|) v`, falling.

    A factor that is longer than r is first reduced to r rows by QR, so the SVD is of a
    matrix `(min(i, r), min(o, r))`; the product itself is formed only where neither is
    longer. Computed and returned in float32 or better.

    The derivative is that of the values alone: `dW = P diag(g) Q^T` for W = P S Q^T,
    taken to the factors through the small matrices. Singular vectors are never
    differentiated, which blows up where values repeat, nor is the QR, which does at a
    zero column. A value that is zero to rounding has no direction of its own; its
    gradient is taken as zero, one of the subgradients there.
    """
    wide = jnp.promote_types(u.dtype, jnp.float32)
    left, right = u.astype(wide), v.astype(wide)
    if s is not None:
        left = left * jnp.abs(s.astype(wide))[..., None, :]
    if u.shape[-1] == 0:
        return jnp.zeros(u.shape[:-2] + (0,), wide)
    return _singular_values(placement.whole(left), placement.whole(right))


@jax.custom_vjp
def _singular_values(
    u: Float[Array, "*stack i r"], v: Float[Array, "*stack r o"]
) -> Float[Array, "*stack n"]:
    (_, left), (_, right) = _reduced(u), _reduced(jnp.swapaxes(v, -1, -2))
    core = exact_product(left, jnp.swapaxes(right, -1, -2))
    return jnp.linalg.svd(core, compute_uv=False)


def _singular_values_forward(u: Array, v: Array) -> tuple[Array, Any]:
    sides = _reduced(u), _reduced(jnp.swapaxes(v, -1, -2))
    core = exact_product(sides[0][1], jnp.swapaxes(sides[1][1], -1, -2))
    p, sigma, z = jnp.linalg.svd(core, full_matrices=False)
    return sigma, (*sides, p, sigma, z)


def _singular_values_backward(
    saved: Any, gradient: Float[Array, "*stack n"]
) -> tuple[Array, Array]:
    (q_u, left), (q_v, right), p, sigma, z = saved
    size = max(p.shape[-2], z.shape[-1])
    rounding = size * jnp.finfo(sigma.dtype).eps * sigma[..., :1]
    gradient = jnp.where(sigma <= rounding, 0, gradient)
    core = exact_product(p * gradient[..., None, :], z)
    d_left = exact_product(core, right)
    d_right = exact_product(jnp.swapaxes(core, -1, -2), left)
    d_u = d_left if q_u is None else exact_product(q_u, d_left)
    d_v = d_right if q_v is None else exact_product(q_v, d_right)
    return d_u, jnp.swapaxes(d_v, -1, -2)


_singular_values.defvjp(_singular_values_forward, _singular_values_backward)


def _reduced(
    side: Float[Array, "*stack i r"],
) -> tuple[Float[Array, "*stack i r"] | None, Float[Array, "*stack k r"]]:
    """Returns Q (None for the identity) and R of a factor, k = min(i, r)."""
    if side.shape[-2] <= side.shape[-1]:
        return None, side
    q, r = jnp.linalg.qr(side)
    return q, r


def stable_rank(spectrum: Float[np.ndarray, "*stack n"]) -> Float[np.ndarray, "*stack"]:
    """Returns `sum s^2 / s_1^2` of singular values, falling; 0 where all are 0."""
    squares = np.square(spectrum, dtype=np.float64)
    first = squares[..., :1].sum(axis=-1)
    return squares.sum(axis=-1) / np.where(first > 0, first, 1)


def effective_rank(
    spectrum: Float[np.ndarray, "*stack n"],
) -> Float[np.ndarray, "*stack"]:
    """Returns `exp(H(s / sum s))` of singular values (Roy and Vetterli, 2007); 0 where
    all are 0."""
    values = np.asarray(spectrum, np.float64)
    total = values.sum(axis=-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total != 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-np.sum(shares * logs, axis=-1)) * np.any(shares, axis=-1)


@jax.checkpoint  # the backward pass forms the product anew: one is alive at a time
def squared_norm(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> Float[Array, "*stack"]:
    """Returns `||u diag(|s|) v||_F^2`, from the product, in i r o operations.

    `trace(u^T u v v^T)` over the Gram matrices would take r^2 (i + o), but it squares
    before it adds: where columns nearly cancel in the product, its rounding error is
    that of `||u||^2 ||v||^2` (7.0e-4 was seen for a norm of 7.2e-7). Here the error is
    relative to what the rounded product has. Derivatives of all orders are finite.
    """
    left = u if s is None else u * jnp.abs(s)[..., None, :]
    v = placement.factor_beside(v, left)
    return jnp.sum(jnp.square(exact_product(left, v)), axis=(-2, -1))


def random_factors(
    key: PRNGKeyArray,
    in_size: int,
    out_size: int,
    rank: int,
    *,
    variance: float | Float[Array, ""],
    stack: tuple[int, ...] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*stack i r"], Float[Array, "*stack r o"]]:
    """Draws normal factors whose product has entries of this variance.

    With deviations a of `u` and b of `v`: `r a^2 b^2 = variance`, and `i a^2 = o b^2`,
    so that the columns of both have the same norm in expectation, as in the balanced
    SVD.

    >>> u, v = random_factors(jax.random.key(0), 8, 4, 2, variance=1 / 8)
    >>> u.shape, v.shape
    ((8, 2), (2, 4))
    """
    both = jnp.sqrt(variance / max(rank, 1))  # the product of the deviations
    ratio = math.sqrt(out_size / in_size)
    u_key, v_key = jax.random.split(key)
    u = jax.random.normal(u_key, (*stack, in_size, rank), dtype)
    v = jax.random.normal(v_key, (*stack, rank, out_size), dtype)
    a, b = jnp.sqrt(both * ratio), jnp.sqrt(both / ratio)
    return u * a.astype(dtype), v * b.astype(dtype)


def column_norms(
    u: Float[Array, "*stack i r"],
    s: Float[Array, "*stack r"] | None,
    v: Float[Array, "*stack r o"],
) -> tuple[Float[Array, "*stack r"], Float[Array, "*stack r"]]:
    """Returns squared norms of the columns of `u diag(|s|)` and of the rows of `v`."""
    left = jnp.sum(jnp.square(u), axis=-2)
    if s is not None:
        left = left * jnp.square(s)
    return left, jnp.sum(jnp.square(v), axis=-1)


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Takes the square root, with gradient 0 at 0 instead of an infinite one.

    A norm that is zero sits at its minimum; 0 is a subgradient there. The usual NaN
    (0 times infinity) would reach every column through the reverse sums of the lasso.
    A NaN in `x` stays one.
    """
    zero = x <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def exact_product(
    left: Float[Array, "*stack a b"], right: Float[Array, "*stack b c"]
) -> Float[Array, "*stack a c"]:
    """Multiplies matrices at the full precision of their arrays on every device."""
    return jnp.matmul(left, right, precision="highest")


def apart(product: Float[Array, "*stack i o"]) -> Float[Array, "*stack i o"]:
    """Returns a product as it is, computed before it is multiplied by anything else.

    XLA before jax 0.12 fuses `((x a) (u v))`, summed over its columns, into one kernel
    on CPUs, whose result is wrong for some shapes (x 4096 x 128, a 128 x 512). It does
    not fuse over a rounding, here to the precision that the numbers have; a barrier is
    gone by then.
    """
    if jax.__version_info__ >= (0, 12):
        return product
    precision = jnp.finfo(product.dtype)
    return jax.lax.reduce_precision(product, precision.nexp, precision.nmant)


def tail_norms(squares: Float[Array, "*stack r"]) -> Float[Array, "*stack r"]:
    """Returns `||X_{>=b}||_F` for every b, from squared norms of the columns of X.

    Entry b (from 0) is the norm of columns b to the last; entry 0 is that of the whole
    X.
    """
    return safe_sqrt(jax.lax.cumsum(squares, axis=squares.ndim - 1, reverse=True))


def is_matrix_product(
    ndim: int,
    dimension_numbers: tuple[
        tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
    ],
    **options: Any,
) -> bool:
    """Returns whether `lax.dot_general` multiplies two matrices: the last axes of
    inputs, of so many in all, meet the first ones of a kernel, and nothing else is
    asked of it."""
    (contracted, by), batch = dimension_numbers
    return (
        tuple(contracted) == tuple(range(ndim - len(contracted), ndim))
        and tuple(by) == tuple(range(len(by)))
        and not any(map(len, batch))
        and options.get("out_sharding") is None
    )
