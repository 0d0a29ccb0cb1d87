"""The check that a traced function keeps nothing between its calls.

What a function puts aside while it is traced, in a closure or an attribute, is there
once for each trace, not once for each step: in jit it is never renewed.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr

from lowrank_jax.errors import UserError


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
        its first.
    """
    graphdef, arrays = nnx.split(model)

    def trace() -> tuple[ClosedJaxpr, tuple[Any, Any]]:
        # A new function each time: JAX would return the first trace of an old one.
        def run(arrays: Any, *arguments: Any) -> tuple[Any, Any]:
            copy = nnx.merge(graphdef, arrays)
            return function(copy, *arguments), nnx.state(copy)

        return jax.make_jaxpr(run, return_shape=True)(arrays, *arguments)

    try:
        first, result = trace()
    except jax.errors.UnexpectedTracerError as error:  # kept from an earlier trace
        raise _kept("traced arrays") from error
    # The first trace went well, so whatever fails now comes of what it left behind.
    # (jax.checking_leaks also names arrays that are kept and never read, which do no
    # harm, but takes up to minutes in a large process.)
    try:
        second, _ = trace()
    except Exception as error:
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


def _equal(first: ClosedJaxpr, second: ClosedJaxpr) -> bool:
    texts = [re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) for jaxpr in (first, second)]
    return texts[0] == texts[1] and all(
        a is b or np.array_equal(a, b)
        for a, b in zip(first.consts, second.consts, strict=True)
    )


def _kept(what: str) -> UserError:
    return UserError(
        f"a traced function must keep nothing between its calls, got one that keeps"
        f" {what}. Give what it remembers to a state: an object with init(model) ->"
        " state and apply(model, state, step), which returns the new state."
    )
