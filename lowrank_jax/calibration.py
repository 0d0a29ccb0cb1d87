"""What a cut model needs data for: BatchNorm statistics."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax.errors import UserError
from lowrank_jax.nnx_internals import split
from lowrank_jax.paths import Model


def use_batch_statistics(model: nnx.Module) -> None:
    """Makes every BatchNorm use the batch's own statistics, and keep them, in place.

    All other layers stay in the mode they are in.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = False
            module.momentum = 0.0  # the running statistics become the batch's own


def has_batch_norm(model: nnx.Module) -> bool:
    """Returns whether the model has running statistics."""
    return any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(model))


def batch_norm_average(
    model: nnx.Module,
    count: Float[Array, ""] | int,
    forward: Callable[[nnx.Module], Any],
) -> nnx.State:
    """Adds the statistics of one batch to BatchNorm's plain average over batches.

    The step of every re-estimation, at any ranks; made to be traced. All other layers
    run as in evaluation; the momentum is not used. Start from any statistics: the first
    batch replaces them.

    Args:
      model: Holds the average over the batches before this one, and stays as it is.
      count: Number of this batch, from 1.
      forward: Runs the model on the batch.

    Returns:
      The `nnx.BatchStat` state with the average over the batches up to this one, to
      `nnx.update` the model with.
    """
    probe = nnx.clone(model)
    probe.eval()
    use_batch_statistics(probe)
    forward(probe)

    def average(mean: Array, batch: Array) -> Array:
        moved = jnp.where(count == 1, batch, mean + (batch - mean) / count)
        return moved.astype(mean.dtype)

    means = nnx.state(model, nnx.BatchStat)
    return jax.tree.map(average, means, nnx.state(probe, nnx.BatchStat))


def recalibrate_batch_norm(
    model: Model,
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> Model:
    """Returns a copy whose BatchNorm statistics are the plain average over batches.

    A truncation changes the statistics of activations. Every running mean and variance
    is replaced by the mean of the batches' own (a cumulative average; the momentum is
    not used and stays as it is). All other layers run as in evaluation; no gradient is
    taken.

    Args:
      model: The model; one without BatchNorm comes back as it is.
      batches: Training batches, of one shape so that nothing recompiles; at least one.
      forward: How to run the model on a batch.

    Raises:
      UserError: There is no batch.
    """
    if not has_batch_norm(model):
        return model
    graphdef, means, rest = split(model, nnx.BatchStat, ...)

    @jax.jit
    def update(means: Any, count: jax.Array, rest: Any, batch: Any) -> Any:
        current = nnx.merge(graphdef, means, rest, copy=True)
        return batch_norm_average(current, count, lambda m: forward(m, batch))

    count = 0
    for batch in batches:
        count += 1
        means = update(means, jnp.float32(count), rest, batch)
    if count == 0:
        raise UserError(
            "recalibrate_batch_norm: batches must hold at least one batch, got none."
            " Give training batches."
        )
    result = nnx.clone(model)
    nnx.update(result, means)
    return result
