"""What is asked of held-out examples to choose ranks: losses, and layers' outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import activations
from lowrank_jax.selection.tails import Errors
from train import convolution, evaluation, narrow
from train.report.searches import SearchProgress
from train.run import Run
from train.state import split_model


def make_score(model: nnx.Module, run: Run) -> Callable[[Sequence[Ranks]], list[float]]:
    """Makes a function that scores rank vectors by minus the loss on held-out examples.

    The model is normalized by the batches' own statistics. One compilation serves all
    rank vectors, and none is scored twice.

    Args:
      model: The model to score.
      run: What it is about: `config.scoring_batches` validation batches are used.
    """
    structure, params, model_state = split_model(_fast(model, run))
    evaluate = evaluation.make_evaluator(structure, run.task, batch_statistics=True)
    batches = run.scoring_batches()

    progress, known = SearchProgress(), {}

    def key_of(ranks: Ranks) -> frozenset[tuple[str, bytes]]:
        """The same for equal ranks, whatever their types and order; checks them."""
        arrays = evaluation.settable(structure, ranks)
        return frozenset((path, rank.tobytes()) for path, rank in arrays.items())

    def score(candidates: Sequence[Ranks]) -> list[float]:
        keys = [key_of(ranks) for ranks in candidates]
        for key, ranks in zip(keys, candidates, strict=True):
            if key in known:
                continue
            polled = run.stop.polled(batches)
            known[key] = -evaluate(params, model_state, ranks, polled)["loss"]
            progress.scored(known[key])
        return [known[key] for key in keys]

    return score


def output_losses(model: nnx.Module, run: Run) -> Errors:
    """Measures what each rank loses of its layer's outputs on held-out examples.

    BatchNorm uses its running statistics, which are of the model's own ranks.

    Args:
      model: The model, at these ranks.
      run: As of `make_score`.
    """
    return activations.output_losses(
        _fast(model, run),
        map(_without_padding, run.stop.polled(run.scoring_batches())),
        lambda model, batch: model(*run.task.inputs(batch, None)),
    )


def _without_padding(batch: Mapping[str, Array]) -> Mapping[str, Any]:
    """The examples of a batch that count."""
    counts = np.asarray(batch["weight"]) > 0
    if counts.all():
        return batch
    return {name: np.asarray(array)[counts] for name, array in batch.items()}


def _fast(model: nnx.Module, run: Run) -> nnx.Module:
    """A copy of a model whose forward passes are fast on a CPU."""
    model = nnx.clone(model)
    if run.placement.mesh.size == 1:
        convolution.use_in(model, narrow.convolve)
    return model
