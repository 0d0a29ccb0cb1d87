"""What a cut model needs data for: BatchNorm statistics."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from lowrank_jax.errors import UserError


def use_batch_statistics(model: nnx.Module) -> None:
    """Makes every BatchNorm use the batch's own statistics, and keep them, in place.

    All other layers stay in the mode they are in.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = False
            module.momentum = 0.0  # the running statistics become the batch's own


def has_batch_norm(model: nnx.Module) -> bool:
    """Whether the model has running statistics."""
    return any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(model))


def recalibrate_batch_norm(
    model: nnx.Module,
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
) -> nnx.Module:
    """A copy whose BatchNorm statistics are the plain average over these batches.

    A truncation changes the statistics of activations. Every running mean and variance
    is replaced by the mean of the batches' own (a cumulative average; the momentum is
    not used and stays as it is). All other layers run as in evaluation; no gradient is
    taken.

    Args:
      model: The model; one without BatchNorm comes back as it is.
      batches: Training batches, of one shape so that nothing recompiles; at least one.
      forward: How to run the model on a batch.
    """
    if not has_batch_norm(model):
        return model
    probe = nnx.clone(model)
    probe.eval()
    use_batch_statistics(probe)
    graphdef, statistics, rest = nnx.split(probe, nnx.BatchStat, ...)

    @jax.jit
    def average(mean: Any, count: jax.Array, statistics: Any, rest: Any, batch: Any):
        current = nnx.merge(graphdef, statistics, rest, copy=True)
        forward(current, batch)
        new = nnx.state(current, nnx.BatchStat)
        return jax.tree.map(lambda a, b: a + (b - a) / count, mean, new)

    mean, count = jax.tree.map(jax.numpy.zeros_like, statistics), 0
    for batch in batches:
        count += 1
        mean = average(mean, jax.numpy.float32(count), statistics, rest, batch)
    if count == 0:
        raise UserError(
            "recalibrate_batch_norm: batches must hold at least one batch, got none."
            " Give training batches."
        )
    result = nnx.clone(model)
    nnx.update(result, mean)
    return result
