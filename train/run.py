"""What a run is about: its config, its task, its data."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array

from lowrank_jax import checkpoint, counting, errors
from lowrank_jax.errors import UserError
from train import registry
from train.data import pipeline
from train.model import build_model, build_task, model_cost
from train.models import MODELS
from train.tasks.base import Task

Batches = Iterable[Mapping[str, Array]]


class Run(NamedTuple):
    """A config with what it stands for.

    Args:
      config: The whole config as plain values.
      task: What is learned, and how it is judged.
      data: What it is learned from.
    """

    config: Mapping[str, Any]
    task: Task
    data: pipeline.Dataset

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

    def fresh_model(self) -> nnx.Module:
        """Builds the config's model, factorized by its rules, from its seed."""
        return build_model(self.config, self.task, allow_imports=None)

    def cost(self, model: nnx.Module) -> counting.ModelCost:
        """Counts a model for one example."""
        return model_cost(model, self.task)

    def training_batches(self, count: int) -> Batches:
        """Returns the first training batches of the config's seed."""
        batches = self.data.train_batches(self.batch_size, seed=self.config["seed"])
        return itertools.islice(batches, count)

    def batches_from(self, step: int) -> Iterator[Mapping[str, Array]]:
        """Returns the training batches from a step on, read ahead in the background."""
        batches = self.data.train_batches(
            self.batch_size, seed=self.config["seed"], start_step=step
        )
        return pipeline.prefetch(batches)

    def eval_batches(self, split: str) -> Batches:
        """Returns the batches of a split, each example once."""
        return self.data.eval_batches(split, self.config["data"]["eval_batch_size"])

    def metadata(self) -> dict[str, Any]:
        """Returns what a checkpoint must say to be used without the config file."""
        return {"config": dict(self.config), "facts": dict(self.data.facts)}


def open_run(
    config: Mapping[str, Any], *, allow_imports: Sequence[str] | None = None
) -> Run:
    """Opens the data of a config and builds its task.

    The defaults of the model's and the data's arguments are written out.

    Args:
      config: The whole config as plain values.
      allow_imports: Packages that names may import from, None for all.
    """
    with errors.at("config.data"):
        about = pipeline.complete(config["data"], allow_imports=allow_imports)
        data = pipeline.load_data(about, allow_imports=allow_imports)
    task = build_task(config, data.facts, allow_imports=allow_imports)
    run = Run({**config, "data": about}, task, data)
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
    run = open_run(config, allow_imports=allow_imports)
    if run.data.facts != saved.metadata["facts"]:
        raise UserError(
            f"checkpoint {saved.path}: its data must be {saved.metadata['facts']}, got"
            f" {run.data.facts} from {run.data.name}. Give the --data_dir of the data"
            " that it was trained on."
        )
    return run
