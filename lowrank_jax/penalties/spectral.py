"""Penalties of the product's spectrum, and of factors that are no bases of it."""

import contextlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import errors, linalg
from lowrank_jax.errors import UserError, raise_all
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties.base import (
    CheckedPenalty,
    Penalty,
    check_every_steps,
    check_weight,
    ratio,
    sum_over_layers,
    unit,
)
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    RankValue,
    check_active,
    lowest,
    name_of,
)


def orthogonality(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers and both factors M of ||G - I_d||_F^2 / d^2`.

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

    return sum_over_layers(weight, lambda u, s, v: distance(u) + distance(v))


def stable_rank(*, weight: float, every_steps: int = 1) -> Penalty:
    """Adds `weight * sum over layers of ||W||_F^2 / ||W||_2^2` (Sanyal et al., 2020).

    At least 1 and at most the rank; 0 at W = 0. The scale of W does not matter.

    Args:
      weight: The same for all layers.
      every_steps: Compute it at steps divisible by this only, since it takes an SVD of
        each layer; its value there is multiplied by it, so that its mean over the steps
        stays the same.
    """

    def term(u: Array, s: Array | None, v: Array) -> Float[Array, ""]:
        squares = jnp.square(unit(linalg.singular_values(u, s, v)))
        return jnp.sum(ratio(jnp.sum(squares, axis=-1), squares[..., 0]))

    return _at_every(every_steps, sum_over_layers(weight, term))


def modified_stable_rank(
    *,
    weight: float,
    target_ranks: Mapping[str, RankValue],
    power: int = 2,
    every_steps: int = 1,
) -> CheckedPenalty:
    """Adds `weight * sum over layers of sum_{b>t} s_b^power / sum_{b<=t} s_b^power`.

    s_b are the singular values of W, falling, and t is the layer's target rank: the
    tail, which truncation will remove, over the head (BSR: Eo et al., 2021). The paper
    gives no formula that we could check; the power, 1 or 2, is our reading (with 2 and
    t = 1 it is the stable rank less 1). The scale of W does not matter; the value is 0
    at W = 0.

    Args:
      weight: The same for all layers.
      target_ranks: t by path, at least 1: a number, or for a stacked layer also nested
        lists of one for each matrix. Layers that are not named are not penalized. At
        most what is allocated when training starts; where less is left since, the
        target is that, and a layer that was cut to rank 0 adds 0.
      power: 1 or 2.
      every_steps: As of `stable_rank`.

    Raises:
      UserError: When called: paths or targets that do not fit the layers, all at once;
        in the check before step 0 also targets above the allocated ranks.
    """
    check_weight(weight)
    if power not in (1, 2):
        raise UserError(f"penalty power: must be 1 or 2, got {power}. Choose one.")

    def term(
        target: RankValue, u: Array, s: Array | None, v: Array
    ) -> Float[Array, ""]:
        powers = unit(linalg.singular_values(u, s, v)) ** power
        kept = np.arange(powers.shape[-1]) < np.asarray(target)[..., None]
        kept = np.broadcast_to(kept, powers.shape)
        head = jnp.sum(jnp.where(kept, powers, 0), axis=-1)
        return jnp.sum(ratio(jnp.sum(jnp.where(kept, 0, powers), axis=-1), head))

    def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        del step
        layers = find_factors(model)
        lowered = _lowered(target_ranks, layers)
        _check_targets(target_ranks, lowered, layers)
        total = jnp.float32(0)
        for path, target in lowered.items():
            if layers[path].max_rank:
                total += term(target, *layers[path].arrays())
        return weight * total

    def check(model: nnx.Module) -> None:
        _check_targets(target_ranks, target_ranks, find_factors(model))

    return CheckedPenalty(_at_every(every_steps, penalty), check)


def frobenius_decay(*, weight: float) -> Penalty:
    """Adds `weight / 2 * sum over layers of ||W||_F^2` (Khodak et al., 2021).

    It replaces weight decay on the factors: give it the weight decay of the dense
    model, and take the factors out of the optimizer's `decayed` pattern.
    """
    return sum_over_layers(
        weight, lambda u, s, v: 0.5 * jnp.sum(linalg.squared_norm(u, s, v))
    )


def _at_every(every_steps: int, penalty: Penalty) -> Penalty:
    """Evaluates the penalty at each n-th step, there n-fold, and 0 at the others."""
    check_every_steps(every_steps)
    if every_steps == 1:
        return penalty

    def sparse(model: nnx.Module, step: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        def compute() -> Float[Array, ""]:
            return every_steps * penalty(model, step)

        dtype = jax.eval_shape(compute).dtype
        due = step % every_steps == 0
        return jax.lax.cond(due, compute, lambda: jnp.zeros((), dtype))

    return sparse


def _lowered(targets: Ranks, layers: Mapping[str, Factors]) -> dict[str, RankValue]:
    """Caps targets at what is allocated; what is no rank stays as it is."""
    lowered = dict(targets)
    for path in targets.keys() & layers.keys():
        with contextlib.suppress(ValueError):  # lists of unequal length
            numbers = np.asarray(targets[path])
            if numbers.dtype.kind in "iu":
                lowered[path] = lowest(targets[path], layers[path].max_rank)
    return lowered


def _check_targets(
    targets: Ranks, lowered: Ranks, layers: Mapping[str, Factors]
) -> None:
    """Checks that lowered targets fit the layers, and that all were at least 1."""
    limits = {}
    for path, factors in layers.items():  # penalties are over the allocated columns
        active = np.full(factors.stack_shape, factors.max_rank).tolist()
        limits[path] = Limits(active, factors.max_rank)
    with errors.at("penalty modified_stable_rank.target_ranks"):
        check_active(lowered, limits)
        raise_all(
            [
                f"{name_of(path)}: must be at least 1, got {target}. Raise it, or leave"
                " the path out."
                for path, target in targets.items()
                if np.any(np.less(target, 1))
            ]
        )
