"""What a config must hold, checked and completed before any work.

A config is a `ml_collections.ConfigDict` in `configs/`; here it is plain JSON values.
Every key is present in the file, and no other. The arguments of named choices may rest
on the defaults of what they name; these are written out, so that the config in a
checkpoint says all there is to say.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import computing, phases, registry, schema, sharding
from train.schema import NAMED, compare, difference, foreign, is_number
from train.tasks import TASKS

DATA = {
    "name": str,
    "args": dict,
    "data_dir": str,
    "batch_size": int,
    "eval_batch_size": int,
    "validation_examples": int,
    "train_examples": int,
}

CONFIG = {
    "seed": int,
    "mesh": sharding.SCHEMA,
    "data": DATA,
    "task": NAMED,
    "model": NAMED,
    "rank_rules": list,
    "init_from": str,
    "phases": list,
    "accumulation_steps": int,
    "steps_per_call": int,
    "compute_dtype": str,
    "log_every_steps": int,
    "eval_every_epochs": int,
    "eval_every_steps": int,
    "eval_fractions": list,
    "recalibration_batches": int,
    "scoring_batches": int,
    "checkpoint_every_epochs": int,
    "checkpoint_every_steps": int,
    "checkpoint_every_minutes": float,
    "keep_checkpoints": int,
    "keep_best": int,
}


def keys() -> list[str]:
    """Lists every key that a config may have, by its dotted path.

    `[]` stands for every entry of a list, as in "phases[].until".
    """
    found = schema.keys(CONFIG)
    after = found.index("phases") + 1
    return found[:after] + [f"phases[].{key}" for key in phases.keys()] + found[after:]


MOST_EXAMPLES = 2**20
"""Of a batch, which is made at once: beyond it one is larger than a machine."""

LEAST = {
    "seed": 0,
    "accumulation_steps": 1,
    "steps_per_call": 1,
    "log_every_steps": 1,
    "eval_every_epochs": 0,
    "eval_every_steps": 0,
    "recalibration_batches": 0,
    "scoring_batches": 1,
    "checkpoint_every_epochs": 0,
    "checkpoint_every_steps": 0,
    "checkpoint_every_minutes": 0,
    "keep_checkpoints": 1,
    "keep_best": 0,
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.validation_examples": 0,
    "data.train_examples": 0,
}
"""The least value of each number."""


def to_json(config: Any) -> dict[str, Any]:
    """Returns a config (a `ConfigDict` or a mapping) as plain JSON values, checked.

    Every default argument of what it names is written out.

    Raises:
      UserError: Missing or unknown keys, values of another type or out of bounds, names
        that do not exist; all offenders of a kind at once.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    errors.raise_all(foreign(values, "config"))
    plain = json.loads(json.dumps(values))
    problems = compare(plain, CONFIG, "config")
    if not problems:
        for index, phase in enumerate(plain["phases"]):
            problems += compare(phase, phases.SCHEMA, f"config.phases[{index}]")
    errors.raise_all(problems)
    errors.raise_all(_bounds(plain))
    return _complete(plain)


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """The config with every default argument written out, but for the model's.

    A model's wait for the task, which says what it is built with (`train.run`).
    """

    with errors.at("config.task"):
        task = registry.complete(config["task"], TASKS, positional=1)
    done = []
    for index, phase in enumerate(config["phases"]):
        with errors.at(phases.place_of(index, phase["name"])):
            done.append(phases.complete(phase))
    return {**config, "task": task, "phases": done}


def too_small(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Lists which of these keys of `LEAST` have a smaller value."""
    problems = []
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        if value < LEAST[key]:
            problems.append(
                f"config.{key}: must be at least {LEAST[key]}, got {value}. Raise it."
            )
    return problems


def _bounds(config: Mapping[str, Any]) -> list[str]:
    """Values that have the right type but make no sense."""
    problems = too_small(config, LEAST)
    for key in ("batch_size", "eval_batch_size"):
        if config["data"][key] > MOST_EXAMPLES:
            problems.append(
                f"config.data.{key}: must be at most {MOST_EXAMPLES:,}, got"
                f" {config['data'][key]:,}. Lower it."
            )
    if (dtype := config["compute_dtype"]) not in computing.DTYPES:
        problems.append(
            "config.compute_dtype: "
            + errors.unknown("a precision", dtype, computing.DTYPES)
        )
    if not config["phases"]:
        problems.append(
            "config.phases: must hold at least one phase, got none. Add one."
        )
    fractions = config["eval_fractions"]
    if not all(is_number(f) and 0 < f <= 1 for f in fractions):
        problems.append(
            f"config.eval_fractions: must be fractions in (0, 1], got {fractions}."
            " Correct them."
        )
    return problems


def differences(file: Path, config: Mapping[str, Any]) -> list[str]:
    """Lists the places where the config that a run wrote into its folder differs.

    The mesh may differ: a run goes on with other devices.

    Args:
      file: The run's config.
      config: The one to compare with.

    Raises:
      UserError: It is not JSON.
    """
    try:
        theirs = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"{file}: must be JSON, got text that is not ({error}). It is damaged; name"
            " another workdir."
        ) from error
    if isinstance(theirs, Mapping):
        theirs = {**theirs, "mesh": config["mesh"]}
    return difference(theirs, config)
