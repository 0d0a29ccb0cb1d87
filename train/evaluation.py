"""Accuracy and loss of a model at any ranks; one compilation for all of them."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_jax import calibration, checkpoint, counting
from lowrank_jax.active import get_ranks, set_ranks
from lowrank_jax.ranks import Ranks, at_fraction
from train import step
from train.data import pipeline
from train.state import Structure, load_model, model_cost, model_state_of, split_model

Figures = dict[str, Any]
"""`{"accuracy", "loss", "params", "macs", "ranks"}`, as every binary prints them."""


def make_evaluator(
    structure: Structure,
    prepare: Callable[[Array], Array],
    *,
    batch_statistics: bool = False,
) -> Callable[[Any, Any, Ranks, Iterable[Mapping[str, Array]]], dict[str, float]]:
    """A function from parameters, model state, ranks and batches to accuracy and loss.

    Ranks are traced: evaluating at others does not recompile. Batches may be padded;
    their `weight` says which examples count.

    Args:
      structure: The model's structure.
      prepare: From pixels to the model's input.
      batch_statistics: Normalize by each batch's own statistics, where running ones of
        other ranks would be wrong.
    """

    @jax.jit
    def sums(params: Any, model_state: Any, ranks: Any, batch: Mapping[str, Array]):
        model = structure.merge(params, model_state, None)
        if batch_statistics:
            calibration.use_batch_statistics(model)
        set_ranks(model, ranks)
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
        arrays = _rank_arrays(ranks)
        total = sum(sums(params, model_state, arrays, batch) for batch in batches)
        hits, loss, count = (float(x) for x in total)
        return {"accuracy": hits / count, "loss": loss / count}

    return evaluate


def make_calibrator(
    structure: Structure,
    prepare: Callable[[Array], Array],
    batches: Callable[[], Iterable[Mapping[str, Array]]],
) -> Callable[[Any, Any, Ranks], Any]:
    """A function from parameters, model state and ranks to the state for these ranks.

    BatchNorm's running statistics become the average over the batches at these ranks,
    so that every nested model has its own (Horvath et al., 2021); one compilation for
    all ranks.
    """

    @jax.jit
    def update(mean: Any, count: Any, params: Any, ranks: Any, batch: Any):
        model = structure.merge(params, mean, None)
        calibration.use_batch_statistics(model)
        set_ranks(model, ranks)
        model(prepare(batch["image"]))
        new = model_state_of(model)
        average = lambda a, b: (a + (b - a) / count).astype(a.dtype)  # noqa: E731
        return jax.tree.map(average, mean, new)

    def calibrate(params: Any, model_state: Any, ranks: Ranks) -> Any:
        arrays = _rank_arrays(ranks)
        for number, batch in enumerate(batches(), 1):
            model_state = update(
                model_state, jnp.float32(number), params, arrays, batch
            )
        return model_state

    return calibrate


def _rank_arrays(ranks: Ranks) -> dict[str, Array]:
    return {path: jnp.asarray(rank, jnp.int32) for path, rank in ranks.items()}


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
    calibrate: Callable[[Any, Any, Ranks], Any] | None = None,
) -> list[Figures]:
    """The frontier: figures at each fraction of the allocated ranks.

    Args:
      evaluate: Of `make_evaluator`.
      params: The parameters.
      model_state: Everything else of the model, such as BatchNorm's statistics.
      max_ranks: The allocated ranks.
      fractions: Fractions of them, in (0, 1].
      batches: Makes the batches to evaluate on.
      cost: What the model costs.
      calibrate: Of `make_calibrator`, to evaluate each size with statistics of its own.
    """
    rows, ranks, results = [], None, {}
    for fraction in fractions:
        last, ranks = ranks, at_fraction(max_ranks, fraction)
        if ranks != last:  # a dense model is the same at every fraction
            state = model_state
            if calibrate is not None:
                state = calibrate(params, model_state, ranks)
            results = evaluate(params, state, ranks, batches())
        rows.append({"rank_fraction": fraction, **figures(results, cost, ranks)})
    return rows


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str = "test",
    fractions: Sequence[float] | None = None,
    recalibration_batches: int = 0,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> Figures | list[Figures]:
    """Figures of a checkpoint at its ranks, or at each of some fractions of them.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      split: "train", "validation" or "test".
      fractions: Fractions of the ranks in (0, 1]; None for the ranks as they are.
      recalibration_batches: Training batches to re-estimate BatchNorm on at each
        fraction; 0 for the statistics of the checkpoint.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    saved = checkpoint.open_checkpoint(path, flag="--checkpoint")
    model = load_model(saved, allow_imports=list(allow_imports))
    config = config_of(saved, data_dir)
    data = pipeline.load_data(config["data"], allow_imports=list(allow_imports))
    structure, params, model_state = split_model(model)
    prepare = step.normalize(config["data"]["mean"], config["data"]["std"])
    evaluate = make_evaluator(structure, prepare)
    cost = model_cost(model, data.image_shape)
    ranks = get_ranks(model)
    batches = functools.partial(
        data.eval_batches, split, config["data"]["eval_batch_size"]
    )
    if fractions is None:
        results = evaluate(params, model_state, ranks, batches())
        return figures(results, cost, ranks)
    calibrate = None
    if recalibration_batches and calibration.has_batch_norm(model):
        calibrate = make_calibrator(
            structure,
            prepare,
            lambda: training_batches(data, config, recalibration_batches),
        )
    return sweep(
        evaluate, params, model_state, ranks, fractions, batches, cost, calibrate
    )


def training_batches(
    data: pipeline.Dataset, config: Mapping[str, Any], count: int
) -> Iterable[Mapping[str, Array]]:
    """The first training batches of a config's seed."""
    batches = data.train_batches(config["data"]["batch_size"], seed=config["seed"])
    return itertools.islice(batches, count)


def config_of(saved: checkpoint.Saved, data_dir: str | None) -> dict[str, Any]:
    """The config in a checkpoint, with the data set somewhere else if asked for."""
    config = saved.metadata["config"]
    if data_dir is None:
        return config
    return {**config, "data": {**config["data"], "data_dir": data_dir}}
