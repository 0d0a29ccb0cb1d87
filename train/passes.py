"""One pass of a step at the ranks that a sampler chose: under a mask, or cut.

A mask takes any ranks, traced ones included, and costs what the whole model costs. At a
rung, whose ranks are known when the step is compiled, the factors are cut first, so
that a pass costs what its size costs; the gradient is the same. Where the rung is drawn
one program holds all of them and runs one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lowrank_jax import active, surgery
from lowrank_jax.ranks import Ranks
from lowrank_jax.samplers import Choice

Place = Callable[[nnx.Module], nnx.Module]
"""Brings a model to the ranks of a pass."""

Value = Callable[[Any, Any], tuple[Array, Any]]
"""`value(params, operands) -> (loss, more)`"""

Forward = Callable[[Place, Any, Any], tuple[Array, Any]]
"""`forward(place, params, operands) -> (loss, more)`, of which the gradient with
respect to `params` is wanted."""


def run(
    forward: Forward,
    choice: Choice,
    rungs: Sequence[Ranks],
    params: Any,
    operands: Any,
) -> tuple[Array, Any]:
    """Runs a pass where it was chosen to run.

    Args:
      forward: The pass; it closes over no traced array.
      choice: The rung, if any, and the ranks.
      rungs: Ranks of all layers, by number.
      params: What the gradient is taken by.
      operands: What else is traced.
    """
    operands = (operands, choice.ranks or {})
    if not choice.among:
        return _at(forward, {})(params, operands)
    numbers = list(choice.among)
    distinct = list(dict.fromkeys(numbers))
    values = [_at(forward, rungs[number]) for number in distinct]
    if len(distinct) == 1:
        return values[0](params, operands)
    branches = jnp.asarray([distinct.index(number) for number in numbers])
    return _run_drawn(values, branches[choice.drawn], params, operands)


def part_of(tree: Any, parts: int, number: Int[Array, ""]) -> Any:
    """Returns the rows of one of so many equal parts of a batch, every `parts`-th row.

    So each device has as many of them as any other.

    Args:
      tree: Arrays with one row per example.
      parts: How many parts there are.
      number: Which of them, in [0, parts).
    """

    def rows(array: Array) -> Array:
        strided = array.reshape(-1, parts, *array.shape[1:])
        return jax.lax.dynamic_index_in_dim(strided, number, axis=1, keepdims=False)

    return jax.tree.map(rows, tree)


def _at(forward: Forward, rung: Ranks) -> Value:
    """The pass on factors cut to a rung, if any, at the ranks among the operands."""

    def value(params: Any, operands: Any) -> tuple[Array, Any]:
        operands, ranks = operands

        def place(model: nnx.Module) -> nnx.Module:
            model = surgery.truncate(model, rung) if rung else model
            active.set_ranks(model, ranks)
            return model

        return forward(place, params, operands)

    return value


def _run_drawn(
    values: Sequence[Value], branch: Int[Array, ""], params: Any, operands: Any
) -> tuple[Array, Any]:
    """Runs one of several passes.

    The gradient is taken inside each branch, along with the value: a switch that is
    differentiated from outside hands over what the backward passes of all its branches
    would need.
    """

    @jax.custom_vjp
    def value(params: Any, operands: Any) -> tuple[Array, Any]:
        branch, operands = operands
        return jax.lax.switch(branch, values, params, operands)

    def value_and_gradient(params: Any, operands: Any) -> tuple[Any, Any]:
        branch, operands = operands
        gradients = [jax.value_and_grad(value, has_aux=True) for value in values]
        return jax.lax.switch(branch, gradients, params, operands)

    def scaled(gradient: Any, cotangents: tuple[Array, Any]) -> tuple[Any, None]:
        scale, _ = cotangents
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, gradient), None

    value.defvjp(value_and_gradient, scaled)
    return value(params, (branch, operands))
