"""What a run is about: its config, its task, its data, and the devices it is on."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array

from lowrank_jax import checkpoint, counting, errors
from lowrank_jax.errors import UserError
from train import registry, sharding, tasks
from train.data import pipeline
from train.model import build_model, build_task, check_facts, model_cost
from train.models import MODELS
from train.sharding import Placement
from train.stopping import StopRequest
from train.tasks import Task

Batches = Iterable[Mapping[str, Array]]


class Run(NamedTuple):
    """A config with what it stands for.

    Args:
      config: The whole config as plain values.
      task: What is learned, and how it is judged.
      data: What it is learned from.
      placement: Where its arrays lie.
      stop: Polled with every batch that is not trained on, so that a stop need not wait
        for the end of an evaluation or a search.
    """

    config: Mapping[str, Any]
    task: Task
    data: pipeline.Dataset
    placement: Placement
    stop: StopRequest

    @property
    def batch_size(self) -> int:
        """Returns the examples of a training step."""
        return self.config["data"]["batch_size"]

    @property
    def steps_per_epoch(self) -> int:
        """Returns the steps of a pass over the training examples."""
        return self.data.steps_per_epoch(self.batch_size)

    @property
    def holds_out(self) -> bool:
        """Returns whether training examples are held out for validation."""
        return self.data.sizes["validation"] > 0

    def complete_model(
        self,
        spec: Mapping[str, Any],
        *,
        allow_imports: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Writes out the default arguments of a model for this task."""
        supplied = {"rngs", *self.task.model_args}
        return registry.complete(
            spec, MODELS, supplied=supplied, allow_imports=allow_imports
        )

    def build_model(self) -> nnx.Module:
        """Builds the config's model, factorized by its rules, from its seed."""
        return build_model(self.config, self.task, allow_imports=None)

    def fresh_model(self) -> nnx.Module:
        """Builds the model on the mesh; where parameters are split, none is ever whole
        on a device."""
        return self.placement.build(self.build_model)

    def cost(self, model: nnx.Module) -> counting.ModelCost:
        """Counts a model for one example."""
        return model_cost(model, self.task)

    def training_batches(self, count: int) -> Batches:
        """Returns the first training batches of the config's seed."""
        batches = itertools.islice(self._train_batches(0), count)
        return self.stop.polled(batches)

    def batches_from(self, step: int) -> Iterator[Mapping[str, Array]]:
        """Returns the training batches from a step on, read ahead in the background."""
        return pipeline.prefetch(self._train_batches(step))

    def _train_batches(self, step: int) -> Iterator[Mapping[str, Array]]:
        size, placement = self.batch_size, self.placement
        batches = self.data.train_batches(
            size,
            seed=self.config["seed"],
            start_step=step,
            rows=placement.rows(size),
        )
        return (placement.batch(batch, size) for batch in batches)

    def eval_batches(self, split: str) -> Batches:
        """Returns the batches of a split, each example once, split over devices."""
        size, placement = self.config["data"]["eval_batch_size"], self.placement
        multiple = placement.batch_shards
        padded = -(-size // multiple) * multiple
        rows = placement.rows(padded)
        batches = self.data.eval_batches(split, size, multiple_of=multiple, rows=rows)
        return self.stop.polled(placement.batch(batch, padded) for batch in batches)

    def host_batches(self, split: str) -> Iterator[Mapping[str, np.ndarray]]:
        """Returns the batches of a split, each example once, in NumPy's arrays."""
        size = self.config["data"]["eval_batch_size"]
        return self.stop.polled(self.data.eval_batches(split, size))

    def scoring_batches(self) -> list[Mapping[str, Array]]:
        """Returns the validation batches that a search scores on, whole everywhere.

        Their statistics normalize what is scored, so they are the same on any number of
        devices.
        """
        batches = self.data.eval_batches(
            "validation", self.config["data"]["eval_batch_size"]
        )
        some = list(itertools.islice(batches, self.config["scoring_batches"]))
        full = [batch for batch in some if batch["weight"].all()]
        # padding would enter the statistics
        return [self.placement.whole(batch) for batch in full or some]

    def metadata(self) -> dict[str, Any]:
        """Returns what a checkpoint must say to be used without the config file."""
        return {"config": dict(self.config), "facts": dict(self.data.facts)}


def open_run(
    config: Mapping[str, Any],
    *,
    allow_imports: Sequence[str] | None = None,
    placement: Placement | None = None,
) -> Run:
    """Opens the data of a config and builds its task.

    The defaults of the model's and the data's arguments are written out, and those of
    the task that the data say.

    Args:
      config: The whole config as plain values.
      allow_imports: Packages that names may import from, None for all.
      placement: Where its arrays lie; None for the config's mesh.

    Raises:
      UserError: What the config names does not exist or does not fit.
    """
    if placement is None:
        placement = sharding.make_placement(config["mesh"])
        _check_shards(config, placement)
    with errors.at("config.data"):
        about = pipeline.complete(config["data"], allow_imports=allow_imports)
        data = pipeline.load_data(about, allow_imports=allow_imports)
    config = tasks.complete(config, data)
    task = build_task(config, data.facts, allow_imports=allow_imports)
    run = Run({**config, "data": about}, task, data, placement, StopRequest())
    with errors.at("config.model"):
        model = run.complete_model(config["model"], allow_imports=allow_imports)
    return run._replace(config={**run.config, "model": model})


def open_checkpoint_run(
    saved: checkpoint.Saved, *, data_dir: str | None, allow_imports: Sequence[str]
) -> Run:
    """Opens the data that a checkpoint was trained on.

    Args:
      saved: The checkpoint.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.

    Raises:
      UserError: The data are other ones.
    """
    config = saved.metadata["config"]
    if data_dir is not None:
        config = {**config, "data": {**config["data"], "data_dir": data_dir}}
    placement = sharding.any_devices(config["mesh"])
    run = open_run(config, allow_imports=allow_imports, placement=placement)
    check_facts(saved, run.data.facts)
    return run


def _check_shards(config: Mapping[str, Any], placement: Placement) -> None:
    """Every device gets as many examples of each part of a batch as any other."""
    size, parts = config["data"]["batch_size"], config["accumulation_steps"]
    shards = placement.batch_shards
    if size % (shards * parts):
        raise UserError(
            f"config.data.batch_size: must be a multiple of {shards * parts}, that is"
            f" config.accumulation_steps {parts} times the {shards} parts over which"
            f" config.mesh splits a batch, got {size}. Change one of them."
        )
