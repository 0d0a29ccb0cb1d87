"""The log-determinant of a matrix, by a quadratic surrogate that is made anew now and
then: iteratively reweighted least squares, as in Q3R (arXiv 2511.04485).

With W0 the matrix at the last refresh, `P = (W0 W0^T + c I)^-1` and s its singular
values, log det is concave in W W^T, hence for every W

    sum_b log(s_b(W)^2 + c) <= <W, P W> + constant, with equal values and slopes at W0.

P is never formed, nor is W: from the left singular vectors A of W0,
`P^(1/2) = A diag(s^2 + c)^(-1/2) A^T + c^(-1/2) (I - A A^T)` acts on u alone. Weights
of the input side alone, and how c falls, are our reading; the paper was not checked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import linalg
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties.base import (
    StatefulPenalty,
    annealed,
    check_annealed,
    check_every_steps,
    check_weight,
)


class LogDeterminantState(NamedTuple):
    """What P of each layer is made of, from the last refresh."""

    left: dict[str, Float[Array, "*stack i r"]]
    squares: dict[str, Float[Array, "*stack r"]]  # of the singular values
    smoothing: Float[Array, ""]


def log_determinant(
    *, weight: float, every_steps: int, start: float, end: float, anneal_steps: int
) -> StatefulPenalty:
    """Adds `weight / 2 * sum over layers of <W, P W>`, of the slope of `log det`.

    Weights small singular values by up to 1 / c and large ones hardly at all, so that
    the small go to zero. Where P is new, the gradient is that of `weight / 2 * sum_b
    log(s_b^2 + c)`. P is made from the factors, by the SVD of a small matrix.

    Args:
      weight: The same for all layers.
      every_steps: P is made anew at steps divisible by this, and stays in between.
      start: c at step 0, in units of s^2.
      end: c from step `anneal_steps` on; in between it goes geometrically.
      anneal_steps: How long that takes, at least 1.
    """
    check_weight(weight)
    check_every_steps(every_steps)
    check_annealed(start, end, anneal_steps)

    def refreshed(
        model: nnx.Module, smoothing: Float[Array, ""]
    ) -> LogDeterminantState:
        left, squares = {}, {}
        for path, factors in find_factors(model).items():
            arrays = jax.lax.stop_gradient(factors.arrays())
            left[path], values, _ = linalg.canonical_form(*arrays)
            squares[path] = jnp.square(values)
        return LogDeterminantState(left, squares, smoothing)

    def smoothing_at(step: Int[Array, ""] | int) -> Float[Array, ""]:
        return jnp.asarray(annealed(start, end, anneal_steps, step), dtype=float)

    def apply(
        model: nnx.Module, state: LogDeterminantState, step: Int[Array, ""] | int
    ) -> tuple[Float[Array, ""], LogDeterminantState]:
        state = jax.lax.cond(
            step % every_steps == 0,
            lambda: refreshed(model, smoothing_at(step)),
            lambda: state,
        )
        c, total = state.smoothing, jnp.float32(0)
        for path, factors in find_factors(model).items():
            u, s, v = factors.arrays()
            left, root = state.left[path], jax.lax.rsqrt(state.squares[path] + c)
            along = linalg.exact_product(jnp.swapaxes(left, -1, -2), u)
            across = u - linalg.exact_product(left, along)
            weighted = linalg.exact_product(left * root[..., None, :], along)
            weighted += jax.lax.rsqrt(c) * across
            total += 0.5 * jnp.sum(linalg.squared_norm(weighted, s, v))
        return weight * total, state

    return StatefulPenalty(
        lambda model: refreshed(model, smoothing_at(0)),
        apply,
        keep=lambda state, model: refreshed(model, state.smoothing),
    )
