"""What a checkpoint says of its run, checked before it is relied on.

It may come from a stranger: nothing that it names is imported here.
"""

import math
from collections.abc import Mapping
from typing import Any

from lowrank_jax import errors, families
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.metadata import is_dtype
from train.config import CONFIG, LEAST, too_small
from train.schema import LARGEST, compare, foreign, pairs

READ = ("seed", "data", "task", "model", "mesh")
"""What is read again of the config; the other keys may be those of another version."""


def read(
    metadata: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, Any]]]:
    """Returns a run's config, the facts of its data, its structure's rules.

    Raises:
      UserError: They are missing or something else; all offenders of a kind at once.
    """
    missing = {"config", "facts", "rank_rules"} - metadata.keys()
    if missing:
        raise UserError(
            f"metadata: must hold config, facts and rank_rules, got no"
            f" {sorted(missing)}. It was not written by train.main or train.truncate of"
            " this version."
        )
    config, facts, rules = (metadata[key] for key in ("config", "facts", "rank_rules"))
    _check_config(config)
    errors.raise_all(compare(facts, dict, "facts"))
    errors.raise_all(compare(facts.get("arrays"), dict, "facts.arrays"))
    for name, array in facts["arrays"].items():
        _check_array(array, f"facts.arrays.{name}")
    with errors.at("rank_rules"):
        errors.raise_all(foreign(rules, "rank_rules"))
        errors.raise_all(compare(rules, list, "rank_rules"))
        return config, facts, pairs(rules)


def family(metadata: Mapping[str, Any]) -> Family:
    """Returns the family that a checkpoint is the largest of, or that its run selected,
    empty where neither is; whether its ranks are those of a model is for the caller to
    check.

    Raises:
      UserError: It is something else.
    """
    run = metadata.get("run", {})
    errors.raise_all(compare(run, dict, "run"))
    selected = run.get("selected", {})
    errors.raise_all(compare(selected, dict, "run.selected"))
    place = "family" if "family" in metadata else "run.selected.family"
    found = metadata.get("family") or selected.get("family") or []
    errors.raise_all(foreign(found, place))
    with errors.at(place.removesuffix("family").rstrip(".") or "metadata"):
        return families.of_pairs(found)


def _check_config(config: Any) -> None:
    errors.raise_all(compare(config, dict, "config"))
    known = {key: config[key] for key in READ if key in config}
    errors.raise_all(foreign(known, "config"))
    errors.raise_all(compare(known, {key: CONFIG[key] for key in READ}, "config"))
    keys = [key for key in LEAST if key.split(".")[0] in READ]
    errors.raise_all(too_small(config, keys))


def _check_array(about: Any, where: str) -> None:
    """One example's shape and dtype; the shape is of something that can be."""
    errors.raise_all(compare(about, {"shape": list, "dtype": str}, where))
    shape = about["shape"]
    sizes = all(type(size) is int and 0 <= size <= LARGEST for size in shape)
    if not sizes or math.prod(shape) > LARGEST or not is_dtype(about["dtype"]):
        raise UserError(
            f"{where}: must have sizes for a shape and the name of a dtype, got"
            f" {about}. Use another checkpoint."
        )
