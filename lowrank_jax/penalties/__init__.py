'''Penalties on factors, added to the loss.

A penalty is a function `penalty(model, step=0) -> scalar` over the *allocated* columns,
whatever the active rank; a factory makes it from plain arguments. `step` counts within
the phase. Write U for `u diag(|s|)`, V for `v`, W for the product `U V`. Each matrix of
a stack counts as a layer of its own, a layer without columns not at all. A whole one:

    def shrink_outputs(*, weight: float) -> Penalty:
        """Adds `weight * sum over layers of ||v||_F^2`."""

        def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0):
            layers = find_factors(model).values()
            return weight * sum(jnp.sum(jnp.square(f.v[...])) for f in layers)

        return penalty

A penalty that remembers something is a `StatefulPenalty` of `init(model) -> state` and
`apply(model, state, step) -> (value, state)`; `stateful` turns either into this form.
The state is carried and saved with the training state, and goes over a cut by `keep`,
or is made anew (`carry` does either). In a closure nothing is remembered:
`check_stateless` refuses it. What must fit the model that training starts from goes
into a `check(model)`, of a `CheckedPenalty` or a `StatefulPenalty`.
'''

from collections.abc import Callable

from lowrank_jax.penalties.base import (
    AnyPenalty,
    CheckedPenalty,
    Penalty,
    StatefulPenalty,
    carry,
    check_stateless,
    stateful,
)
from lowrank_jax.penalties.columns import (
    funnel,
    group_lasso,
    hierarchical_group_lasso,
    hoyer,
    hoyer_square,
    l1,
    nuclear,
)
from lowrank_jax.penalties.reweighted import log_determinant
from lowrank_jax.penalties.spectral import (
    frobenius_decay,
    modified_stable_rank,
    orthogonality,
    stable_rank,
)

PENALTIES: dict[str, Callable[..., AnyPenalty]] = {
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
        log_determinant,
    )
}
"""The penalties by the name they have in configs."""

__all__ = [
    "PENALTIES",
    "AnyPenalty",
    "CheckedPenalty",
    "Penalty",
    "StatefulPenalty",
    "carry",
    "check_stateless",
    "stateful",
    *PENALTIES,
]
