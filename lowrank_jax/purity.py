"""The check that a traced function keeps nothing between its calls.

What a function puts aside while it is traced, in a closure or an attribute, is there
once for each trace, not once for each step: in jit it is never renewed.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowrank_jax import placement
from lowrank_jax.errors import UserError

_LEAKS = (jax.errors.UnexpectedTracerError, flax.errors.TraceContextError)
"""What is raised where an array or a module of an earlier trace is used in a later."""


def check_pure(
    function: Callable[..., Any], model: nnx.Module, *arguments: Any
) -> tuple[Any, Any]:
    """Traces `function(model, *arguments)` twice, without computing anything.

    Args:
      function: From the model and arrays to arrays. It may set the model's arrays.
      model: Concrete or abstract; it stays as it is.
      arguments: Pytrees of arrays, concrete or abstract.

    Returns:
      What the function returns, as shapes, and the model's state after it.

    Raises:
      UserError: It reads what an earlier trace left behind, or its second trace is not
        its first. What else the function raises passes through.
    """
    graphdef, arrays = nnx.split(model)

    def trace() -> tuple[Any, tuple[Any, Any]]:
        # A new function each time: JAX would return the first trace of an old one.
        def run(arrays: Any, *arguments: Any) -> tuple[Any, Any]:
            copy = nnx.merge(graphdef, arrays)
            return function(copy, *arguments), nnx.state(copy)

        return jax.make_jaxpr(run, return_shape=True)(arrays, *arguments)

    # (jax.checking_leaks also names arrays that are kept and never read, which do no
    # harm, but takes up to minutes in a large process.)
    try:
        (first, result), (second, _) = trace(), trace()
    except _LEAKS as error:
        raise _kept("traced arrays") from error
    if any(isinstance(c, jax.core.Tracer) for c in (*first.consts, *second.consts)):
        raise _kept("traced arrays")
    if not _equal(first, second):
        raise _kept("something, since its second trace is not its first")
    return result


def check_same_state(state: Any, new_state: Any) -> None:
    """Raises UserError unless a state comes out of a step as it went in."""
    old, new = (jax.tree.map(_type_of, tree) for tree in (state, new_state))
    if old != new:
        raise UserError(
            "apply must return a state of the structure, shapes and dtypes of init's,"
            f" got {new} for {old}. Cast it."
        )


def _type_of(array: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], Any]:
    return array.shape, array.dtype


def _equal(first: Any, second: Any) -> bool:
    texts = [re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) for jaxpr in (first, second)]
    return texts[0] == texts[1] and all(
        a is b or _equal_arrays(a, b)
        for a, b in zip(first.consts, second.consts, strict=True)
    )


def _equal_arrays(first: Any, second: Any) -> bool:
    """Compares two constants; a NaN equals a NaN."""
    first, second = (
        placement.to_host(jax.random.key_data(x) if _is_key(x) else x)
        for x in (first, second)
    )
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(np.all((first == second) | ((first != first) & (second != second))))


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key)


def _kept(what: str) -> UserError:
    return UserError(
        f"a traced function must keep nothing between its calls, got one that keeps"
        f" {what}. Give what it remembers to a state: an object with init(model) ->"
        " state and apply(model, state, step), which returns the new state."
    )
