"""What a task is, and what tasks share.

A task stands between a data set, which gives batches of named arrays, and a model, of
which it knows nothing but inputs and outputs. It is all that knows what a batch means:
the loop, the step and the evaluation go through the functions below.

A batch may have "weight" (b,), which is how much each example counts: in evaluation 0
for the rows that pad the last batch. Letters: `b` batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Batch = Mapping[str, Array]
"""Named arrays, b rows of each."""


class Task(NamedTuple):
    """What is learned, and how it is judged: pure functions, traced inside the step.

    A factory `task(facts, **args)` makes one of the facts of a data set (see
    `train.data.sources.RawDataset`) and the arguments in the config; it raises a
    `UserError` that names the arrays it misses.

    Args:
      model_args: Keyword arguments that every model of the task is built with, as JSON
        values, such as the shape of an input and the number of outputs.
      example: Model inputs for one example (a batch of one), without values: to count
        parameters and MACs on, and to trace.
      inputs: `inputs(batch, key) -> inputs`, the positional arguments of the model;
        augmented with a key, plain with None.
      loss: `loss(outputs, batch) -> scalar`, the mean over the batch by weight.
      distill: `distill(outputs, teacher_outputs, batch) -> scalar`, what a pupil learns
        from a teacher, the mean by weight, least where both agree. No gradient flows
        through the teacher's outputs: they come stopped.
      sums: `sums(outputs, batch) -> {name: scalar}`, which add up over batches; one is
        "weight", the summed weights.
      figures: `figures(sums) -> {name: float}`, what the sums over all batches become;
        one is "loss".
      headline: The figure to choose and to plot models by.
      higher_is_better: Whether more of the headline is better.
    """

    model_args: Mapping[str, Any]
    example: tuple[jax.ShapeDtypeStruct, ...]
    inputs: Callable[[Batch, PRNGKeyArray | None], tuple[Array, ...]]
    loss: Callable[[Any, Batch], Float[Array, ""]]
    distill: Callable[[Any, Any, Batch], Float[Array, ""]]
    sums: Callable[[Any, Batch], dict[str, Array]]
    figures: Callable[[Mapping[str, Any]], dict[str, float]]
    headline: str
    higher_is_better: bool


def weighted_mean(values: Float[Array, " b"], batch: Batch) -> Float[Array, ""]:
    """Returns the mean of a value per example, by the batch's weight if it has one."""
    if "weight" not in batch:
        return values.mean()
    weight = batch["weight"]
    return jnp.sum(values * weight) / weight.sum()


def weighted_sums(batch: Batch, **values: Array) -> dict[str, Array]:
    """Returns the sum of each value per example times its weight, and "weight" itself.

    Args:
      batch: The batch, with or without "weight".
      **values: Values per example, (b,), by name.
    """
    (size,) = {len(per_example) for per_example in values.values()}
    weight = batch.get("weight", jnp.ones(size, jnp.float32))
    sums = {name: jnp.sum(array * weight) for name, array in values.items()}
    return {**sums, "weight": weight.sum()}


def figures_per_weight(sums: Mapping[str, Any]) -> dict[str, float]:
    """Returns each sum divided by the summed weight."""
    weight = float(sums["weight"])
    return {name: float(x) / weight for name, x in sums.items() if name != "weight"}
