"""Accuracy and loss of a model at any ranks; one compilation for all of them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_jax import checkpoint, counting, surgery
from lowrank_jax.selection.solvers import at_fraction
from lowrank_jax.surgery import Ranks
from train import input_pipeline, steps
from train import state as state_lib
from train.state import Structure

Figures = dict[str, Any]
"""`{"accuracy", "loss", "params", "macs", "ranks"}`, as every binary prints them."""


def make_evaluator(
    structure: Structure, prepare: Callable[[Array], Array]
) -> Callable[[Any, Any, Ranks, Iterable[Mapping[str, Array]]], dict[str, float]]:
    """A function from parameters, model state, ranks and batches to accuracy and loss.

    Ranks are traced: evaluating at others does not recompile. Batches may be padded;
    their `weight` says which examples count.
    """

    @jax.jit
    def sums(params: Any, model_state: Any, ranks: Any, batch: Mapping[str, Array]):
        model = structure.merge(params, model_state, None)
        surgery.set_ranks(model, ranks)
        logits, labels = model(prepare(batch["image"])), batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = jnp.argmax(logits, axis=-1) == labels
        weight = batch["weight"]
        return jnp.stack(
            [jnp.sum(hits * weight), jnp.sum(losses * weight), weight.sum()]
        )

    def evaluate(
        params: Any,
        model_state: Any,
        ranks: Ranks,
        batches: Iterable[Mapping[str, Array]],
    ) -> dict[str, float]:
        arrays = {path: jnp.asarray(rank, jnp.int32) for path, rank in ranks.items()}
        total = sum(sums(params, model_state, arrays, batch) for batch in batches)
        hits, loss, count = (float(x) for x in total)
        return {"accuracy": hits / count, "loss": loss / count}

    return evaluate


def figures(
    results: Mapping[str, float], cost: counting.ModelCost, ranks: Ranks
) -> Figures:
    """What evaluation found, with what the model costs at these ranks."""
    return {
        **results,
        "params": cost.params(ranks),
        "macs": cost.macs(ranks),
        "ranks": dict(ranks),
    }


def sweep(
    evaluate: Callable[..., dict[str, float]],
    params: Any,
    model_state: Any,
    max_ranks: Ranks,
    fractions: Sequence[float],
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    cost: counting.ModelCost,
) -> list[Figures]:
    """The frontier: figures at each fraction of the allocated ranks."""
    rows = []
    for fraction in fractions:
        ranks = at_fraction(max_ranks, fraction)
        results = evaluate(params, model_state, ranks, batches())
        rows.append({"rank_fraction": fraction, **figures(results, cost, ranks)})
    return rows


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str = "test",
    fractions: Sequence[float] | None = None,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> Figures | list[Figures]:
    """Figures of a checkpoint at its ranks, or at each of some fractions of them.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      split: "train", "validation" or "test".
      fractions: Fractions of the ranks in (0, 1]; None for the ranks as they are.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    saved = checkpoint.open_checkpoint(path, flag="--checkpoint")
    model = state_lib.load_model(saved, allow_imports=list(allow_imports))
    config = config_of(saved, data_dir)
    data = input_pipeline.load_data(config["data"], allow_imports=list(allow_imports))
    structure, params, model_state = state_lib.split_model(model)
    prepare = steps.normalize(config["data"]["mean"], config["data"]["std"])
    evaluate = make_evaluator(structure, prepare)
    cost = state_lib.model_cost(model, data.image_shape)
    ranks = surgery.get_ranks(model)
    batches = functools.partial(
        data.eval_batches, split, config["data"]["eval_batch_size"]
    )
    if fractions is None:
        results = evaluate(params, model_state, ranks, batches())
        return figures(results, cost, ranks)
    return sweep(evaluate, params, model_state, ranks, fractions, batches, cost)


def config_of(saved: checkpoint.Saved, data_dir: str | None) -> dict[str, Any]:
    """The config in a checkpoint, with the data set somewhere else if asked for."""
    config = saved.metadata["config"]
    if data_dir is None:
        return config
    return {**config, "data": {**config["data"], "data_dir": data_dir}}
