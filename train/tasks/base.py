"""What a task is, and what tasks share.

A task stands between a data set, which gives batches of named arrays, and a model, of
which it knows nothing but inputs and outputs. It is all that knows what a batch means:
the loop, the step and the evaluation go through the functions below.

A batch may have "weight" (b,), which is how much each example counts: in evaluation 0
for the rows that pad the last batch. Letters: `b` batch, `o` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lowrank_jax.errors import UserError

Batch = Mapping[str, Array]
"""Named arrays, b rows of each."""

_MISSING: Any = None
"""A part that must be there: left out, it is named with all others (`check_parts`)."""


class Generation(NamedTuple):
    """How a model of a task writes text, token by token.

    `begin` reads a prompt; then the model's own `decode(tokens, cache) -> (logits,
    cache)` takes one token after the other, at a cost that the prefix does not change.
    The `position` of a cache is how many tokens it holds.

    Args:
      encode: From one text to the arrays of one prompt.
      begin: `begin(model, arrays) -> (logits, cache)`, traced: the logits (b, o) of the
        first token to write, for prompts of the same shapes, b rows of each array.
      decode: From the tokens that were written to their text.
      stop: The token that ends a text; None if none does.
      limit: Most tokens that a cache holds.
      needs: What a model must have beside being called, such as `decode`.
      extend: From the arrays of a prompt and the tokens (n,) that were written until
        its cache was full, to the arrays of a prompt to go on from; None where a text
        is then over.
      pairs: From a batch on the host to its (prompt, reference) texts.
      score: From the texts that were written and their references to figures.
    """

    encode: Callable[[str], Mapping[str, np.ndarray]]
    begin: Callable[[Any, Mapping[str, Array]], tuple[Float[Array, "b o"], Any]]
    decode: Callable[[Sequence[int]], str]
    stop: int | None
    limit: int
    needs: tuple[str, ...] = ("decode",)
    extend: (
        Callable[[Mapping[str, np.ndarray], np.ndarray], Mapping[str, np.ndarray]]
        | None
    ) = None
    pairs: Callable[[Batch], list[tuple[str, str]]] | None = None
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]] | None = None


class Task(NamedTuple):
    """What is learned, and how it is judged: pure functions, traced inside the step.

    A factory `task(facts, **args)` makes one of the facts of a data set (see
    `train.data.sources.RawDataset`) and the arguments in the config; it raises a
    `UserError` that names the arrays it misses.

    Args:
      model_args: Keyword arguments that every model of the task is built with, as JSON
        values, such as the shape of an input and the number of outputs.
      example: Model inputs to count parameters and MACs on, without values: a batch of
        one unit.
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
      unit: What MACs are counted for, such as a token of a text.
      generation: How text is written; None where none is.
    """

    model_args: Mapping[str, Any] = _MISSING
    example: tuple[jax.ShapeDtypeStruct, ...] = _MISSING
    inputs: Callable[[Batch, PRNGKeyArray | None], tuple[Array, ...]] = _MISSING
    loss: Callable[[Any, Batch], Float[Array, ""]] = _MISSING
    distill: Callable[[Any, Any, Batch], Float[Array, ""]] = _MISSING
    sums: Callable[[Any, Batch], dict[str, Array]] = _MISSING
    figures: Callable[[Mapping[str, Any]], dict[str, float]] = _MISSING
    headline: str = _MISSING
    higher_is_better: bool = _MISSING
    unit: str = "example"
    generation: Generation | None = None


def check_parts(task: Task) -> None:
    """Raises UserError where a task lacks parts, or has others in their places."""
    calls = ("inputs", "loss", "distill", "sums", "figures")
    right = {name: callable(getattr(task, name)) for name in calls} | {
        "model_args": isinstance(task.model_args, Mapping),
        "example": isinstance(task.example, tuple) and bool(task.example),
        "headline": isinstance(task.headline, str),
        "higher_is_better": isinstance(task.higher_is_better, bool),
        "unit": isinstance(task.unit, str),
        "generation": isinstance(task.generation, Generation | None),
    }
    wrong = [name for name in task._fields if not right[name]]
    if wrong:
        got = ", ".join(f"{name} {getattr(task, name)!r}" for name in wrong)
        raise UserError(
            f"must have every part of train.tasks.Task, got {got}. Give them:"
            " functions but for model_args (a dict), example (a tuple of"
            " ShapeDtypeStruct), headline (a name) and higher_is_better (a bool)."
        )


def weighted_mean(values: Float[Array, " b"], batch: Batch) -> Float[Array, ""]:
    """Returns the mean of a value per example, by the batch's weight if it has one."""
    if "weight" not in batch:
        return values.mean()
    return mean_by(values, batch["weight"])


def mean_by(values: Float[Array, "*b"], weight: Float[Array, "*b"]) -> Float[Array, ""]:
    """Returns the mean of values by their weights, 0 where none of them counts.

    A part of a batch may hold padding alone; its mean then enters with weight 0.
    """
    total = weight.sum()
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)


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
    """Returns each sum divided by the summed weight.

    Raises:
      UserError: Nothing counted.
    """
    weight = float(sums["weight"])
    if weight == 0:
        raise UserError(
            "data: must hold something that counts, got a weight of 0 in all. Correct"
            " 'weight', or what else says how much of each example counts."
        )
    return {name: float(x) / weight for name, x in sums.items() if name != "weight"}
