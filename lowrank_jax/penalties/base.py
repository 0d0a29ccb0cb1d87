"""What a penalty is, with and without a state, and what several penalties share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.purity import check_pure, check_same_state


class Penalty(Protocol):
    """A function of the model and the phase's step."""

    def __call__(
        self, model: nnx.Module, step: Int[Array, ""] | int = 0
    ) -> Float[Array, ""]: ...


class StatefulPenalty(NamedTuple):
    """A penalty that remembers something from step to step.

    Args:
      init: Makes the state, a pytree of arrays, for a model.
      apply: From the model, the state and the phase's step to the value and the new
        state, of the same shapes and dtypes. Traced.
      keep: Carries the state over a cut, to the model after it; called outside jit.
        None: the state is made anew by `init`.
      check: Refuses arguments that do not fit the model that training starts from,
        before step 0. None where there are none such.
    """

    init: Callable[[nnx.Module], Any]
    apply: Callable[
        [nnx.Module, Any, Int[Array, ""] | int], tuple[Float[Array, ""], Any]
    ]
    keep: Callable[[Any, nnx.Module], Any] | None = None
    check: Callable[[nnx.Module], None] | None = None


class CheckedPenalty(NamedTuple):
    """A penalty whose arguments must fit the model that training starts from.

    Args:
      function: The penalty; it also takes what that model becomes by cuts.
      check: As of `StatefulPenalty`.
    """

    function: Penalty
    check: Callable[[nnx.Module], None]

    def __call__(
        self, model: nnx.Module, step: Int[Array, ""] | int = 0
    ) -> Float[Array, ""]:
        return self.function(model, step)


AnyPenalty: TypeAlias = Penalty | StatefulPenalty

Term: TypeAlias = Callable[
    [
        Float[Array, "*stack i r"],
        Float[Array, "*stack r"] | None,
        Float[Array, "*stack r o"],
    ],
    Float[Array, ""],
]
"""What the arrays `u, s, v` of one layer add to a penalty."""


def stateful(penalty: AnyPenalty) -> StatefulPenalty:
    """Returns a penalty in the form with a state, `()` for a plain function.

    >>> penalty = stateful(lambda model, step=0: 2.0)
    >>> penalty.apply(nnx.Dict(), penalty.init(nnx.Dict()), 0)
    (2.0, ())
    """
    check = getattr(penalty, "check", None)
    if hasattr(penalty, "init") and hasattr(penalty, "apply"):
        keep = getattr(penalty, "keep", None)
        return StatefulPenalty(penalty.init, penalty.apply, keep, check)
    return StatefulPenalty(
        lambda model: (),
        lambda model, state, step: (penalty(model, step), state),
        check=check,
    )


def carry(penalty: StatefulPenalty, state: Any, model: nnx.Module) -> Any:
    """Returns a penalty's state for the model after a cut, kept where it can be."""
    return penalty.init(model) if penalty.keep is None else penalty.keep(state, model)


def check_stateless(penalty: AnyPenalty, model: nnx.Module) -> None:
    """Checks that a penalty keeps nothing but the state that it returns.

    Traces it on the model that training starts from, concrete or abstract, before any
    step; its own `check` comes first.

    Raises:
      UserError: Its arguments do not fit the model, it keeps something in a closure or
        an attribute, its value is no scalar, or its state changes shape from step to
        step.
    """
    init, apply, _, check = stateful(penalty)
    with errors.at("penalty"):
        if check is not None:
            check(model)
        state, _ = check_pure(init, model)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        (value, new_state), _ = check_pure(apply, model, state, step)
        if jnp.shape(value) != ():
            raise UserError(
                f"must be a scalar, got shape {jnp.shape(value)}. Sum over the layers."
            )
        check_same_state(state, new_state)


def sum_over_layers(weight: float, term: Term) -> Penalty:
    """Makes the penalty that is a weight times the sum of a term over all layers."""
    check_weight(weight)

    def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        del step
        total = jnp.float32(0)
        for factors in find_factors(model).values():
            if factors.max_rank:
                total += term(*factors.arrays())
        return weight * total

    return penalty


def check_weight(weight: float) -> None:
    """Raises UserError for a weight that would reward large columns."""
    if not weight >= 0:
        raise UserError(
            f"penalty weight: must be >= 0, got {weight}. Give a weight of that kind."
        )


def check_every_steps(every_steps: int) -> None:
    """Raises UserError for an interval below one step."""
    if every_steps < 1:
        raise UserError(
            f"penalty every_steps: must be >= 1, got {every_steps}. Raise it."
        )


def annealed(
    start: float, end: float, anneal_steps: int, step: Int[Array, ""] | int
) -> Float[Array, ""]:
    """Goes from `start` at step 0 to `end` at `anneal_steps` geometrically, then stays.

    `check_annealed` has refused what has no geometric mean.
    """
    part = jnp.minimum(step, anneal_steps) / anneal_steps
    return start * (end / start) ** part


def check_annealed(start: float, end: float, anneal_steps: int) -> None:
    """Raises UserError unless both ends are positive, at least a step apart."""
    for name, value in (("start", start), ("end", end)):
        if not value > 0:
            raise UserError(f"penalty {name}: must be > 0, got {value}. Raise it.")
    if anneal_steps < 1:
        raise UserError(
            f"penalty anneal_steps: must be >= 1, got {anneal_steps}. Raise it."
        )


def unit(values: Float[Array, "*stack r"]) -> Float[Array, "*stack r"]:
    """Divides by the largest, so that squares neither overflow nor vanish.

    The divisor counts as a constant: what is made of the result must not depend on the
    scale. Zeros stay, and a NaN does.
    """
    largest = jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))
    return values / jnp.where(largest == 0, 1, largest)


def ratio(
    top: Float[Array, "*stack"], bottom: Float[Array, "*stack"]
) -> Float[Array, "*stack"]:
    """Returns `top / bottom`, and 0 with gradient 0 where `bottom` is 0."""
    zero = bottom == 0
    return jnp.where(zero, 0, top / jnp.where(zero, 1, bottom))
