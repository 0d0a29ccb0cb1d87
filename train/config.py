"""What a config must hold, checked before any work.

A config is a `ml_collections.ConfigDict` in `configs/`; here it is plain JSON values.
Every key is present in the file, and no other: a misspelled key is an error, not a
default.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.errors import UserError

NAMED = {"name": str, "args": dict}
"""A choice from a table, or an import path, and its arguments."""

DATA = {
    "name": str,
    "args": dict,
    "data_dir": str,
    "batch_size": int,
    "eval_batch_size": int,
    "validation_examples": int,
    "mean": list,
    "std": list,
    "augment": list,
}

OPTIMIZER = {
    "name": str,
    "args": dict,
    "learning_rate": float,
    "schedule": NAMED,
    "weight_decay": float,
    "decayed": str,
    "clip_norm": float,
}

SHRINK = {"every_epochs": int, "threshold": float, "multiple": int}
"""When and how ranks are cut; an empty mapping for never."""

UNTIL = ("steps", "epochs", "to_epoch")
"""How long a phase is: so many steps, so many epochs, or to this epoch of the run; with
a "condition" beside it, at most so long."""

PHASE = {
    "name": str,
    "until": dict,
    "sampler": NAMED,
    "teacher": NAMED,
    "passes_loss": str,
    "penalties": list,
    "projections": list,
    "trainable": list,
    "optimizer": OPTIMIZER,
    "optimizer_state": str,
    "shrink": dict,
    "on_end": list,
}

CONFIG = {
    "seed": int,
    "data": DATA,
    "model": NAMED,
    "rank_rules": list,
    "init_from": str,
    "phases": list,
    "log_every_steps": int,
    "eval_every_epochs": int,
    "eval_fractions": list,
    "recalibration_batches": int,
    "checkpoint_every_epochs": int,
    "keep_checkpoints": int,
}


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, checked (a `ConfigDict` or a mapping).

    Raises:
      ValueError: Missing or unknown keys, values of another type or out of bounds; all
        offenders at once.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    try:
        plain = json.loads(json.dumps(values))
    except TypeError as error:
        raise UserError(
            f"config: must hold JSON values only, got {error}. Name functions by import"
            " path."
        ) from error
    problems = _compare(plain, CONFIG, "config")
    if not problems:
        for index, phase in enumerate(plain["phases"]):
            problems += _compare(phase, PHASE, f"config.phases[{index}]")
    problems = problems or _bounds(plain)
    if problems:
        raise UserError("\n".join(problems))
    return plain


def difference(one: Any, other: Any, where: str = "config") -> list[str]:
    """The places where two configs differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            line
            for key in sorted({*one, *other})
            for line in difference(one.get(key), other.get(key), f"{where}.{key}")
        ]
    return [] if one == other else [f"{where}: {one!r} there, {other!r} here"]


def _compare(value: Any, schema: Any, where: str) -> list[str]:
    """What keeps a value from having the keys and types of a schema."""
    if isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            return [f"{where}: must be a mapping with {sorted(schema)}, got {value!r}."]
        unknown, missing = sorted(value.keys() - schema), sorted(schema.keys() - value)
        problems = []
        if unknown:
            problems.append(
                f"{where}: keys must be of {sorted(schema)}, got {unknown}. Correct the"
                " spelling."
            )
        if missing:
            problems.append(f"{where}: must have {missing}, got none. Add them.")
        known = schema.keys() & value.keys()
        return problems + [
            problem
            for key in sorted(known)
            for problem in _compare(value[key], schema[key], f"{where}.{key}")
        ]
    kinds = (int, float) if schema is float else schema
    if not isinstance(value, kinds) or (isinstance(value, bool) and schema is not bool):
        return [
            f"{where}: must be of type {schema.__name__}, got {value!r}. Correct it."
        ]
    return []


def _bounds(config: Mapping[str, Any]) -> list[str]:
    """Values that have the right type but make no sense."""
    data, problems = config["data"], []
    positive = {
        f"config.data.{key}": data[key] for key in ("batch_size", "eval_batch_size")
    }
    positive["config.log_every_steps"] = config["log_every_steps"]
    positive["config.keep_checkpoints"] = config["keep_checkpoints"]
    for where, value in positive.items():
        if value < 1:
            problems.append(f"{where}: must be at least 1, got {value}. Raise it.")
    if config["seed"] < 0:
        problems.append(f"config.seed: must be at least 0, got {config['seed']}.")
    natural = ("eval_every_epochs", "checkpoint_every_epochs", "recalibration_batches")
    for key in natural:
        if config[key] < 0:
            problems.append(
                f"config.{key}: must be >= 0 (0 is never), got {config[key]}."
            )
    if not config["phases"]:
        problems.append("config.phases: must hold at least one phase, got none.")
    if any(not _in_unit(f) for f in config["eval_fractions"]):
        problems.append(
            "config.eval_fractions: must be fractions in (0, 1], got"
            f" {config['eval_fractions']}. Correct them."
        )
    for key in ("mean", "std"):
        if not all(_is_number(n) and (key == "mean" or n > 0) for n in data[key]):
            rule = "numbers" if key == "mean" else "positive numbers"
            problems.append(
                f"config.data.{key}: must be {rule}, one for each channel, got"
                f" {data[key]}. Correct it."
            )
    for index, phase in enumerate(config["phases"]):
        problems += _phase_bounds(phase, f"config.phases[{index}] ({phase['name']})")
    return problems


def _phase_bounds(phase: Mapping[str, Any], where: str) -> list[str]:
    problems = _until_bounds(phase["until"], f"{where}.until")
    choices = {"passes_loss": ("mean", "sum"), "optimizer_state": ("new", "kept")}
    for key, allowed in choices.items():
        if phase[key] not in allowed:
            problems.append(
                f"{where}.{key}: must be {' or '.join(map(repr, allowed))}, got"
                f" {phase[key]!r}."
            )
    shrink = phase["shrink"]
    mistakes = _compare(shrink, SHRINK, f"{where}.shrink") if shrink else []
    problems += mistakes
    if shrink and not mistakes and min(shrink["every_epochs"], shrink["multiple"]) < 1:
        problems.append(
            f"{where}.shrink: every_epochs and multiple must be at least 1, got"
            f" {shrink}."
        )
    for key in ("penalties", "projections", "on_end"):
        for spec in phase[key]:
            problems += _compare(spec, NAMED, f"{where}.{key}")
    patterns = phase["trainable"]
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        problems.append(
            f"{where}.trainable: must be regular expressions, one for each epoch in"
            f" turn, got {patterns}. Use ('.*',) to train everything."
        )
    return problems


def _until_bounds(until: Mapping[str, Any], where: str) -> list[str]:
    lengths = {key: value for key, value in until.items() if key != "condition"}
    if set(lengths) not in [{key} for key in UNTIL] or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0
        for n in lengths.values()
    ):
        return [
            f"{where}: must be {{'steps': n}}, {{'epochs': n}} or {{'to_epoch': n}}"
            f" with n >= 1, and may have a 'condition', got {until}. Give the phase a"
            " length."
        ]
    if "condition" in until:
        return _compare(until["condition"], NAMED, f"{where}.condition")
    return []


def _in_unit(fraction: Any) -> bool:
    return _is_number(fraction) and 0 < fraction <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairs(rules: Sequence[Sequence[Any]], where: str) -> list[tuple[str, Any]]:
    """JSON's lists of two as pairs.

    Raises:
      ValueError: An entry that is not a pair.
    """
    for rule in rules:
        if not isinstance(rule, list) or len(rule) != 2 or not isinstance(rule[0], str):
            raise UserError(
                f"{where}: every entry must be a pair of a name and a value, got"
                f" {rule!r}. Correct it."
            )
    return [(rule[0], rule[1]) for rule in rules]
