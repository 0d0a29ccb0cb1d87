"""Regression on vectors: squared error, judged by the relative error."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lowrank_jax.errors import UserError
from train.tasks import base
from train.tasks.base import Batch, Task

Outputs = Float[Array, "b o"]


def regression(facts: Mapping[str, Any], *, noise: float) -> Task:
    """Makes the task of a data set with vectors "x" and "y".

    Args:
      facts: The data set's facts.
      noise: Deviation of what is added to the inputs that are trained on.

    Raises:
      UserError: The data set has other arrays.
    """
    shapes = {name: facts["arrays"].get(name, {}).get("shape") for name in ("x", "y")}
    if not all(shape and len(shape) == 1 for shape in shapes.values()):
        raise UserError(f"data: must have vectors 'x' and 'y', got {shapes}.")
    ((in_features,), (out_features,)) = shapes.values()

    def inputs(batch: Batch, key: PRNGKeyArray | None) -> tuple[Array]:
        if key is None or not noise:
            return (batch["x"],)
        return (batch["x"] + noise * jax.random.normal(key, batch["x"].shape),)

    def distance(outputs: Outputs, targets: Outputs) -> Float[Array, " b"]:
        return jnp.mean(jnp.square(outputs - targets), axis=-1)

    def loss(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        return base.weighted_mean(distance(outputs, batch["y"]), batch)

    def distill(outputs: Outputs, teacher: Outputs, batch: Batch) -> Float[Array, ""]:
        return base.weighted_mean(distance(outputs, teacher), batch)

    def sums(outputs: Outputs, batch: Batch) -> dict[str, Array]:
        targets = batch["y"]
        return base.weighted_sums(
            batch,
            loss=distance(outputs, targets),
            square=distance(targets, 0 * targets),
        )

    def figures(sums: Mapping[str, Any]) -> dict[str, float]:
        means = base.figures_per_weight(sums)
        relative_error = math.sqrt(means["loss"] / means["square"])
        return {"relative_error": relative_error, "loss": means["loss"]}

    return Task(
        model_args={"in_features": in_features, "out_features": out_features},
        example=(jax.ShapeDtypeStruct((1, in_features), jnp.float32),),
        inputs=inputs,
        loss=loss,
        distill=distill,
        sums=sums,
        figures=figures,
        headline="relative_error",
        higher_is_better=False,
    )
