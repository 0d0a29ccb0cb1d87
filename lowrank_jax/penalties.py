"""Penalties on factors, added to the loss.

A penalty is a function `penalty({path: Factors}, step) -> scalar` over the allocated
columns; a factory makes it from plain arguments. Write U for `u diag(|s|)`, V for `v`,
W for the product `U V`. Each matrix of a stack counts as a layer of its own, a layer
without columns not at all. `step` counts within the phase.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowrank_jax import linalg
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.ranks import RankValue

Penalty: TypeAlias = Callable[
    [Mapping[str, Factors], "Int[Array, ''] | int"], Float[Array, ""]
]

Term: TypeAlias = Callable[
    [
        Float[Array, "*stack i r"],
        Float[Array, "*stack r"] | None,
        Float[Array, "*stack r o"],
    ],
    Float[Array, ""],
]
"""What the arrays `u, s, v` of one layer add to a penalty."""


def hierarchical_group_lasso(*, weight: float) -> Penalty:
    """`weight * sum over layers and b of ||U_{>=b}||_F + ||V_{>=b}||_F`.

    X_{>=b} are columns b to the last, counted from 1 (Horvath et al., 2024, eq. 7).
    Later columns are in more groups, so they go to zero first and the rank falls from
    the end. The gradient is finite at zero tails.

    Args:
      weight: The papers' lambda, the same for all layers.
    """
    return _sum_of_norms(weight, linalg.tail_norms)


def group_lasso(*, weight: float) -> Penalty:
    """`weight * sum over layers and b of ||u_b|| + ||v_b||`, each column its own
    group."""
    return _sum_of_norms(weight, linalg.safe_sqrt)


def orthogonality(*, weight: float) -> Penalty:
    """`weight * sum over layers and both factors M of ||G - I_d||_F^2 / d^2`.

    G is the smaller Gram matrix of M `(a, b)`, d = min(a, b) its size (Yang et al.,
    2020: keeps `u` and `v` near singular vectors, and |s| near the singular
    values, without an SVD). `s` is not in it.
    """

    def distance(factor: Float[Array, "*stack a b"]) -> Float[Array, ""]:
        other = jnp.swapaxes(factor, -1, -2)
        tall = factor.shape[-2] >= factor.shape[-1]
        gram = linalg.exact_product(*((other, factor) if tall else (factor, other)))
        size = gram.shape[-1]
        eye = jnp.broadcast_to(jnp.eye(size, dtype=gram.dtype), gram.shape)
        return jnp.sum(jnp.square(gram - eye)) / size**2

    return _sum_over_layers(weight, lambda u, s, v: distance(u) + distance(v))


def l1(*, weight: float) -> Penalty:
    """`weight * sum over layers of sum_b |s_b|` (Yang et al., 2020)."""
    return _sum_over_scales(weight, "l1", jnp.sum)


def hoyer(*, weight: float) -> Penalty:
    """`weight * sum over layers of sum_b |s_b| / ||s||_2 - 1` (Yang et al., 2020).

    Between 0 (one column) and sqrt(r) - 1 (all equal); the scale of `s` does not
    matter. Value and gradient are 0 at `s = 0`.
    """

    def measure(s: Float[Array, "*stack r"]) -> Float[Array, ""]:
        s = _unit(s)
        norm = linalg.safe_sqrt(jnp.sum(jnp.square(s), axis=-1))
        return jnp.sum(_ratio(jnp.sum(s, axis=-1) - norm, norm))

    return _sum_over_scales(weight, "hoyer", measure)


def hoyer_square(*, weight: float) -> Penalty:
    """`weight * sum over layers of (sum_b |s_b|)^2 / sum_b s_b^2 - 1`.

    Between 0 (one column) and r - 1 (all equal), else as `hoyer` (Yang et al., 2020).
    """

    def measure(s: Float[Array, "*stack r"]) -> Float[Array, ""]:
        s = _unit(s)
        squares = jnp.sum(jnp.square(s), axis=-1)
        return jnp.sum(_ratio(jnp.square(jnp.sum(s, axis=-1)) - squares, squares))

    return _sum_over_scales(weight, "hoyer_square", measure)


def stable_rank(*, weight: float, every_steps: int = 1) -> Penalty:
    """`weight * sum over layers of ||W||_F^2 / ||W||_2^2` (Sanyal et al., 2020).

    At least 1 and at most the rank; 0 at W = 0. The scale of W does not matter.

    Args:
      weight: The same for all layers.
      every_steps: Compute it at steps divisible by this only, since it takes an SVD of
        each layer; its value there is multiplied by it, so that its mean over the steps
        stays the same.
    """

    def term(u, s, v) -> Float[Array, ""]:
        squares = jnp.square(_unit(linalg.singular_values(u, s, v)))
        return jnp.sum(_ratio(jnp.sum(squares, axis=-1), squares[..., 0]))

    return _at_every(every_steps, _sum_over_layers(weight, term))


def modified_stable_rank(
    *,
    weight: float,
    target_ranks: Mapping[str, RankValue],
    power: int = 2,
    every_steps: int = 1,
) -> Penalty:
    """`weight * sum over layers of sum_{b>t} s_b^power / sum_{b<=t} s_b^power`.

    s_b are the singular values of W, falling, and t is the layer's target rank: the
    tail, which truncation will remove, over the head (BSR: Eo et al., 2021). The paper
    gives no formula that we could check; the power, 1 or 2, is our reading (with 2 and
    t = 1 it is the stable rank less 1). The scale of W does not matter; the value is 0
    at W = 0.

    Args:
      weight: The same for all layers.
      target_ranks: t by path, at least 1: a number, or for a stacked layer also nested
        lists of one for each matrix. Layers that are not named are not penalized.
      power: 1 or 2.
      every_steps: As of `stable_rank`.

    Raises:
      ValueError: When called: paths or targets that do not fit the layers, all at once.
    """
    _check_weight(weight)
    if power not in (1, 2):
        raise UserError(f"penalty power: must be 1 or 2, got {power}.")

    def term(target: RankValue, u, s, v) -> Float[Array, ""]:
        powers = _unit(linalg.singular_values(u, s, v)) ** power
        kept = np.arange(powers.shape[-1]) < np.asarray(target)[..., None]
        kept = np.broadcast_to(kept, powers.shape)
        head = jnp.sum(jnp.where(kept, powers, 0), axis=-1)
        return jnp.sum(_ratio(jnp.sum(jnp.where(kept, 0, powers), axis=-1), head))

    def penalty(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        del step
        _check_targets(target_ranks, factors)
        total = jnp.float32(0)
        for path, target in target_ranks.items():
            total += term(target, *factors[path].arrays())
        return weight * total

    return _at_every(every_steps, penalty)


def nuclear(*, weight: float) -> Penalty:
    """`weight / 2 * sum over layers of ||u||_F^2 + ||v||_F^2`; with `s`, of
    `sum_b |s_b| (||u_b||^2 + ||v_b||^2)`.

    At least the nuclear norm of W, and equal to it at the balanced factors, or with `s`
    at the SVD; so weight decay on factors is a nuclear-norm penalty (Srebro et al.,
    2004, lemma 1).
    """

    def term(u, s, v) -> Float[Array, ""]:
        left, right = linalg.column_norms(u, None, v)
        norms = left + right if s is None else jnp.abs(s) * (left + right)
        return 0.5 * jnp.sum(norms)

    return _sum_over_layers(weight, term)


def frobenius_decay(*, weight: float) -> Penalty:
    """`weight / 2 * sum over layers of ||W||_F^2` (Khodak et al., 2021).

    It replaces weight decay on the factors: give it the weight decay of the dense
    model, and take the factors out of the optimizer's `decayed` pattern.
    """
    return _sum_over_layers(
        weight, lambda u, s, v: 0.5 * jnp.sum(linalg.squared_norm(u, s, v))
    )


def funnel(*, weight: float, start: float, end: float, anneal_steps: int) -> Penalty:
    """`weight * sum over layers and b of x_b / (x_b + c)`, x_b a column's size.

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
    _check_weight(weight)
    for name, value in (("start", start), ("end", end)):
        if not value > 0:
            raise UserError(f"penalty {name}: must be > 0, got {value}.")
    if anneal_steps < 1:
        raise UserError(f"penalty anneal_steps: must be >= 1, got {anneal_steps}.")

    def penalty(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        part = jnp.minimum(step, anneal_steps) / anneal_steps
        c = start * (end / start) ** part

        def term(u, s, v) -> Float[Array, ""]:
            left, right = linalg.column_norms(u, None, v)
            size = linalg.safe_sqrt(left) * linalg.safe_sqrt(right)
            size = size if s is None else jnp.abs(s)
            return jnp.sum(size / (size + c))

        return _sum_over_layers(weight, term)(factors, step)

    return penalty


def _sum_of_norms(
    weight: float,
    norms: Callable[[Float[Array, "*stack r"]], Float[Array, "*stack r"]],
) -> Penalty:
    def term(u, s, v) -> Float[Array, ""]:
        left, right = linalg.column_norms(u, s, v)
        return jnp.sum(norms(left)) + jnp.sum(norms(right))

    return _sum_over_layers(weight, term)


def _sum_over_layers(weight: float, term: Term) -> Penalty:
    _check_weight(weight)

    def penalty(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        del step
        total = jnp.float32(0)
        for one in factors.values():
            u, s, v = one.arrays()
            if u.shape[-1]:
                total += term(u, s, v)
        return weight * total

    return penalty


def _sum_over_scales(
    weight: float,
    name: str,
    measure: Callable[[Float[Array, "*stack r"]], Float[Array, ""]],
) -> Penalty:
    """A penalty of |s| alone; `name` is its own, for errors."""
    inner = _sum_over_layers(weight, lambda u, s, v: measure(jnp.abs(s)))

    def penalty(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        without = [path for path, one in factors.items() if one.s is None]
        if without:
            raise UserError(
                f"{', '.join(without)}: penalty {name} needs factors with scales s, got"
                ' none. Set "with_s": true in rank_rules, or penalize the product.'
            )
        return inner(factors, step)

    return penalty


def _at_every(every_steps: int, penalty: Penalty) -> Penalty:
    """The penalty at each n-th step, there n-fold, and 0 at the others."""
    if every_steps < 1:
        raise UserError(f"penalty every_steps: must be >= 1, got {every_steps}.")
    if every_steps == 1:
        return penalty

    def sparse(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        def compute() -> Float[Array, ""]:
            return every_steps * penalty(factors, step)

        dtype = jax.eval_shape(compute).dtype
        due = step % every_steps == 0
        return jax.lax.cond(due, compute, lambda: jnp.zeros((), dtype))

    return sparse


def _unit(values: Float[Array, "*stack r"]) -> Float[Array, "*stack r"]:
    """Divided by the largest, so that squares neither overflow nor vanish.

    The divisor counts as a constant: what is made of the result must not depend on the
    scale. Zeros stay, and a NaN does.
    """
    largest = jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))
    return values / jnp.where(largest == 0, 1, largest)


def _ratio(
    top: Float[Array, "*stack"], bottom: Float[Array, "*stack"]
) -> Float[Array, "*stack"]:
    """`top / bottom`, and 0 with gradient 0 where `bottom` is 0."""
    zero = bottom == 0
    return jnp.where(zero, 0, top / jnp.where(zero, 1, bottom))


def _check_weight(weight: float) -> None:
    if not weight >= 0:
        raise UserError(f"penalty weight: must be >= 0, got {weight}.")


def _check_targets(
    targets: Mapping[str, RankValue], factors: Mapping[str, Factors]
) -> None:
    problems = []
    for path, target in targets.items():
        where = f"penalty modified_stable_rank.target_ranks: {path}:"
        if path not in factors:
            problems.append(
                f"{where} must be a low-rank layer, got an unknown path. The model has"
                f" {list(factors)}."
            )
            continue
        limit, stack = factors[path].max_rank, factors[path].stack_shape
        try:
            ranks = np.asarray(target)
        except ValueError:  # lists of unequal length
            ranks = np.asarray(None)
        whole = ranks.dtype.kind in "iu" and ranks.shape in ((), stack)
        if not whole or ranks.min() < 1 or ranks.max() > limit:
            lists = f" or nested lists of shape {stack}" if stack else ""
            problems.append(
                f"{where} must be a whole number in [1, {limit}]{lists}, got {target}."
                " Give one, or leave the path out."
            )
    if problems:
        raise UserError("\n".join(problems))


PENALTIES: dict[str, Callable[..., Penalty]] = {
    penalty.__name__: penalty
    for penalty in (
        hierarchical_group_lasso,
        group_lasso,
        orthogonality,
        l1,
        hoyer,
        hoyer_square,
        stable_rank,
        modified_stable_rank,
        nuclear,
        frobenius_decay,
        funnel,
    )
}
"""The penalties by the name they have in configs."""
