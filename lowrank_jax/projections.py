"""Projections: constraints on the spectra of factors, applied after the update.

A projection is a function `project(model, step=0)` that sets the model's factors in
place, over the allocated columns; a factory makes it from plain arguments. Within jit
the factors are traced copies. `step` counts within the phase; W is `u diag(|s|) v`.

One that remembers something is a `StatefulProjection`, whose state travels as a
penalty's; `stateful` turns either into this form.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lowrank_jax import errors, linalg
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.purity import check_pure, check_same_state
from lowrank_jax.ranks import name_of


class Projection(Protocol):
    """Sets the factors of a model in place."""

    def __call__(self, model: nnx.Module, step: Int[Array, ""] | int = 0) -> None: ...


class StatefulProjection(NamedTuple):
    """A projection that remembers something from step to step.

    Args:
      init: Makes the state, a pytree of arrays, for a model.
      apply: Sets the factors of the model in place, from the state and the phase's
        step; returns the new state, of the same shapes and dtypes. Traced.
      keep: Carries the state over a cut, to the model after it; called outside jit.
        None: the state is made anew by `init`.
    """

    init: Callable[[nnx.Module], Any]
    apply: Callable[[nnx.Module, Any, Int[Array, ""] | int], Any]
    keep: Callable[[Any, nnx.Module], Any] | None = None


AnyProjection: TypeAlias = Projection | StatefulProjection


def stateful(projection: AnyProjection) -> StatefulProjection:
    """Returns a projection in the form with a state, `()` for a plain function."""
    if hasattr(projection, "init") and hasattr(projection, "apply"):
        keep = getattr(projection, "keep", None)
        return StatefulProjection(projection.init, projection.apply, keep)

    def apply(model: nnx.Module, state: Any, step: Int[Array, ""] | int) -> Any:
        projection(model, step)
        return state

    return StatefulProjection(lambda model: (), apply)


def carry(projection: StatefulProjection, state: Any, model: nnx.Module) -> Any:
    """Returns a projection's state for the model after a cut, kept where it can be."""
    if projection.keep is None:
        return projection.init(model)
    return projection.keep(state, model)


def check_stateless(projection: AnyProjection, model: nnx.Module) -> None:
    """Checks that a projection keeps nothing but the state that it returns.

    Traces it on the model, concrete or abstract, before any step.

    Raises:
      UserError: It keeps something in a closure or an attribute, or its state changes
        shape from step to step.
    """
    init, apply, _ = stateful(projection)
    with errors.at("projection"):
        state, _ = check_pure(init, model)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        new_state, _ = check_pure(apply, model, state, step)
        check_same_state(state, new_state)


def _check_settable(layers: Mapping[str, Factors]) -> None:
    """Only u and v can be set, so that there must be nothing else in the product."""
    others = [
        name_of(path)
        for path, factors in layers.items()
        if factors.middle is not None or not factors.nested
    ]
    if others:
        raise UserError(
            f"{', '.join(others)}: a projection must have factors u and v alone to set,"
            " got middle factors or another form. Canonicalize the factored model"
            " first."
        )


def stable_rank_normalization(
    *, stable_rank: float, every_steps: int = 1
) -> Projection:
    """Keeps each layer's stable rank at most c (Sanyal et al., 2020).

    With `s_1 p_1 q_1^T` the leading singular triplet of W, the rest of W is multiplied
    by `gamma = sqrt(c - 1) s_1 / ||rest||_F` where the stable rank is above c; else
    nothing changes. The factors stay in their gauge, so that the optimizer's moments
    keep their meaning: `sqrt(gamma) I + (1 - sqrt(gamma)) p_1 p_1^T` is multiplied to
    `u` from the left, the same with q_1 to `v` from the right; `s` stays.

    Args:
      stable_rank: c, at least 1.
      every_steps: Project at steps divisible by this only.
    """
    if not stable_rank >= 1:
        raise UserError(
            f"projection stable_rank: must be >= 1, got {stable_rank}. Raise it."
        )
    if every_steps < 1:
        raise UserError(
            f"projection every_steps: must be >= 1, got {every_steps}. Raise it."
        )

    def normalized(u: Array, s: Array | None, v: Array) -> tuple[Array, Array]:
        p, sigma, q = linalg.canonical_form(u, s, v)
        p, q = p[..., :1], q[..., :1, :]
        first, squares = sigma[..., 0], jnp.sum(jnp.square(sigma[..., 1:]), axis=-1)
        limit = (stable_rank - 1) * jnp.square(first)
        gamma = jnp.sqrt(limit / jnp.where(squares == 0, 1, squares))
        above, root = squares > limit, jnp.sqrt(gamma)[..., None, None]
        along = linalg.exact_product(jnp.swapaxes(p, -1, -2), u)
        new_u = root * u + (1 - root) * linalg.exact_product(p, along)
        along = linalg.exact_product(v, jnp.swapaxes(q, -1, -2))
        new_v = root * v + (1 - root) * linalg.exact_product(along, q)
        above = above[..., None, None]
        return jnp.where(above, new_u, u), jnp.where(above, new_v, v)

    def project(model: nnx.Module, step: Int[Array, ""] | int = 0) -> None:
        layers = find_factors(model)
        _check_settable(layers)
        for factors in layers.values():
            u, s, v = factors.arrays()
            if u.shape[-1] == 0:
                continue
            if every_steps == 1:
                u, v = normalized(u, s, v)
            else:
                u, v = jax.lax.cond(
                    step % every_steps == 0, normalized, lambda u, s, v: (u, v), u, s, v
                )
            factors.u.set_value(u)
            factors.v.set_value(v)

    return project


PROJECTIONS: dict[str, Callable[..., AnyProjection]] = {
    projection.__name__: projection for projection in (stable_rank_normalization,)
}
"""The projections by the name they have in configs."""
