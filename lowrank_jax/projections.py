"""Projections: constraints on the spectra of factors, applied after the update.

A projection is a function `project({path: Factors}, step)` that sets the factors in
place, over the allocated columns; a factory makes it from plain arguments. Within jit
the factors are traced copies. `step` counts within the phase; W is `u diag(|s|) v`.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lowrank_jax import linalg
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors

Projection: TypeAlias = Callable[[Mapping[str, Factors], "Int[Array, ''] | int"], None]


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
        raise UserError(f"projection stable_rank: must be >= 1, got {stable_rank}.")
    if every_steps < 1:
        raise UserError(f"projection every_steps: must be >= 1, got {every_steps}.")

    def normalized(u, s, v):
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

    def project(factors: Mapping[str, Factors], step: Int[Array, ""] | int) -> None:
        middles = [path for path, one in factors.items() if one.middle is not None]
        if middles:
            raise UserError(
                f"{', '.join(middles)}: projection stable_rank_normalization must set u"
                " and v alone, but the layer has middle factors; canonicalize first."
            )
        for one in factors.values():
            u, s, v = one.arrays()
            if u.shape[-1] == 0:
                continue
            if every_steps == 1:
                u, v = normalized(u, s, v)
            else:
                u, v = jax.lax.cond(
                    step % every_steps == 0, normalized, lambda u, s, v: (u, v), u, s, v
                )
            one.u.set_value(u)
            one.v.set_value(v)

    return project


PROJECTIONS: dict[str, Callable[..., Projection]] = {
    projection.__name__: projection for projection in (stable_rank_normalization,)
}
"""The projections by the name they have in configs."""
