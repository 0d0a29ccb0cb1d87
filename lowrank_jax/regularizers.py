"""Penalties on factors, added to the loss.

A penalty is a function `penalty({path: Factors}, step) -> scalar` over the allocated
columns; a factory makes it from plain arguments. Write U for `u diag(|s|)`, V for `v`.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank_jax import linalg
from lowrank_jax.factors import Factors

Penalty: TypeAlias = Callable[
    [Mapping[str, Factors], "Int[Array, ''] | int"], Float[Array, ""]
]


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


def _sum_of_norms(
    weight: float,
    norms: Callable[[Float[Array, "*stack r"]], Float[Array, "*stack r"]],
) -> Penalty:
    if weight < 0:
        raise ValueError(f"penalty weight: must be >= 0, got {weight}.")

    def penalty(factors: Mapping[str, Factors], step: Int[Array, ""] | int):
        del step
        total = jnp.float32(0)
        for one in factors.values():
            left, right = linalg.column_norms(*one.arrays())
            total += jnp.sum(norms(left)) + jnp.sum(norms(right))
        return weight * total

    return penalty


PENALTIES: dict[str, Callable[..., Penalty]] = {
    penalty.__name__: penalty for penalty in (hierarchical_group_lasso, group_lasso)
}
"""The penalties by the name they have in configs."""
