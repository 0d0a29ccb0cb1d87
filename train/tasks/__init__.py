"""Tasks by name: what is learned of a data set, and how it is judged.

`train.registry` turns a name into its factory, which is called as `factory(facts,
**args)` with the facts of the data set and the config's arguments, and returns a
`train.tasks.base.Task`. The table holds import paths, so that listing the names imports
no task.
"""

from collections.abc import Mapping
from typing import Any

from lowrank_jax import errors
from train import registry
from train.data.pipeline import Dataset
from train.tasks.base import Task, check_parts

__all__ = ["COMPLETED_BY", "TASKS", "Task", "check_parts", "complete"]

TASKS: dict[str, str] = {
    "classification": "train.tasks.classification:classification",
    "language_model": "train.tasks.language_model:language_model",
    "translation": "train.tasks.translation:translation",
}

COMPLETED_BY: dict[str, str] = {
    "classification": "train.tasks.classification:complete_args",
}
"""What writes out those arguments of a task that its data say, `(args, data) -> args`,
by the name of the task."""


def complete(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Returns a config with the arguments of its task that the data say."""
    spec = config["task"]
    if spec["name"] not in COMPLETED_BY:
        return dict(config)
    written_out = registry.resolve(spec["name"], COMPLETED_BY, allow_imports=())
    with errors.at("config.task"):
        return {**config, "task": {**spec, "args": written_out(spec["args"], data)}}
