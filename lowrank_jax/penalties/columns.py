"""Penalties of columns and scales: group lassos, norms, Hoyer measures, the funnel."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import linalg
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties.base import (
    Penalty,
    annealed,
    check_annealed,
    check_weight,
    ratio,
    sum_over_layers,
    unit,
)
from lowrank_jax.ranks import name_of


def hierarchical_group_lasso(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers and b of ||U_{>=b}||_F + ||V_{>=b}||_F`.

    X_{>=b} are columns b to the last, counted from 1 (Horvath et al., 2024, eq. 7).
    Later columns are in more groups, so they go to zero first and the rank falls from
    the end. The gradient is finite at zero tails.

    Args:
      weight: The papers' lambda, the same for all layers.
    """
    return _sum_of_norms(weight, linalg.tail_norms)


def group_lasso(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers and b of ||u_b|| + ||v_b||`, each column its own
    group."""
    return _sum_of_norms(weight, linalg.safe_sqrt)


def l1(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers of sum_b |s_b|` (Yang et al., 2020)."""
    return _sum_over_scales(weight, "l1", jnp.sum)


def hoyer(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers of sum_b |s_b| / ||s||_2 - 1` (Yang et al., 2020).

    Between 0 (one column) and sqrt(r) - 1 (all equal); the scale of `s` does not
    matter. Value and gradient are 0 at `s = 0`.
    """

    def measure(s: Float[Array, "*stack r"]) -> Float[Array, ""]:
        s = unit(s)
        norm = linalg.safe_sqrt(jnp.sum(jnp.square(s), axis=-1))
        return jnp.sum(ratio(jnp.sum(s, axis=-1) - norm, norm))

    return _sum_over_scales(weight, "hoyer", measure)


def hoyer_square(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers of (sum_b |s_b|)^2 / sum_b s_b^2 - 1`.

    Between 0 (one column) and r - 1 (all equal), else as `hoyer` (Yang et al., 2020).
    """

    def measure(s: Float[Array, "*stack r"]) -> Float[Array, ""]:
        s = unit(s)
        squares = jnp.sum(jnp.square(s), axis=-1)
        return jnp.sum(ratio(jnp.square(jnp.sum(s, axis=-1)) - squares, squares))

    return _sum_over_scales(weight, "hoyer_square", measure)


def nuclear(*, weight: float) -> Penalty:
    """Adds `weight / 2 * sum over layers of ||u||_F^2 + ||v||_F^2`; with `s`, of
    `sum_b |s_b| (||u_b||^2 + ||v_b||^2)`.

    At least the nuclear norm of W, and equal to it at the balanced factors, or with `s`
    at the SVD; so weight decay on factors is a nuclear-norm penalty (Srebro et al.,
    2004, lemma 1).
    """

    def term(u: Array, s: Array | None, v: Array) -> Float[Array, ""]:
        left, right = linalg.column_norms(u, None, v)
        norms = left + right if s is None else jnp.abs(s) * (left + right)
        return 0.5 * jnp.sum(norms)

    return sum_over_layers(weight, term)


def funnel(*, weight: float, start: float, end: float, anneal_steps: int) -> Penalty:
    """Adds `weight * sum over layers and b of x_b / (x_b + c)`, x_b a column's size.

    x_b is |s_b|, without `s` it is ||u_b|| ||v_b||. Bounded and concave: small columns
    are pushed to zero, large ones hardly at all, the more so the smaller c, and the sum
    tends to the number of columns. This form, and how c falls, are our reading of
    the funnel function (Chu and Lee, 2021). The gradient is finite at zero.

    Args:
      weight: The same for all layers.
      start: c at step 0, in units of x.
      end: c from step `anneal_steps` on; in between it goes geometrically.
      anneal_steps: How long that takes, at least 1.
    """
    check_weight(weight)
    check_annealed(start, end, anneal_steps)

    def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        c = annealed(start, end, anneal_steps, step)

        def term(u: Array, s: Array | None, v: Array) -> Float[Array, ""]:
            left, right = linalg.column_norms(u, None, v)
            size = linalg.safe_sqrt(left) * linalg.safe_sqrt(right)
            size = size if s is None else jnp.abs(s)
            return jnp.sum(size / (size + c))

        return sum_over_layers(weight, term)(model, step)

    return penalty


def _sum_of_norms(
    weight: float,
    norms: Callable[[Float[Array, "*stack r"]], Float[Array, "*stack r"]],
) -> Penalty:
    """Makes a penalty of the columns' squared norms on both sides."""

    def term(u: Array, s: Array | None, v: Array) -> Float[Array, ""]:
        left, right = linalg.column_norms(u, s, v)
        return jnp.sum(norms(left)) + jnp.sum(norms(right))

    return sum_over_layers(weight, term)


def _sum_over_scales(
    weight: float,
    name: str,
    measure: Callable[[Float[Array, "*stack r"]], Float[Array, ""]],
) -> Penalty:
    """Makes a penalty of |s| alone; `name` is its own, for errors."""

    def term(u: Array, s: Array | None, v: Array) -> Float[Array, ""]:
        assert s is not None  # `penalty` refuses layers without
        return measure(jnp.abs(s))

    inner = sum_over_layers(weight, term)

    def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        without = [p for p, factors in find_factors(model).items() if factors.s is None]
        if without:
            raise UserError(
                f"{', '.join(map(name_of, without))}: penalty {name} needs factors with"
                ' scales s, got none. Set "with_s": true in rank_rules, or penalize the'
                " product."
            )
        return inner(model, step)

    return penalty
