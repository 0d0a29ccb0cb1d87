"""The little language in which configs are described, and their comparison with it.

A schema is a type (`int`, `str`, `list`, ...; `float` takes whole numbers too) or a
mapping from keys to schemas. Every key is present in a config, and no other: a
misspelled key is an error, not a default.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.errors import UserError

NAMED = {"name": str, "args": dict}
"""A choice from a table, or an import path, and its arguments."""


def compare(value: Any, schema: Any, where: str) -> list[str]:
    """Lists what keeps a value from having the keys and types of a schema."""
    if isinstance(schema, Mapping):
        return _compare_mapping(value, schema, where)
    kinds = (int, float) if schema is float else schema
    if not isinstance(value, kinds) or (isinstance(value, bool) and schema is not bool):
        return [
            f"{where}: must be of type {schema.__name__}, got {value!r}. Give one of"
            " that type."
        ]
    return []


def difference(theirs: Any, ours: Any, where: str = "config") -> list[str]:
    """Lists the places where two configs differ, with both values."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return [
            line
            for key in sorted({*theirs, *ours})
            for line in difference(theirs.get(key), ours.get(key), f"{where}.{key}")
        ]
    if (
        isinstance(theirs, list)
        and isinstance(ours, list)
        and len(theirs) == len(ours)
        and all(isinstance(item, Mapping) for item in theirs + ours)
    ):
        return [
            line
            for index, pair in enumerate(zip(theirs, ours, strict=True))
            for line in difference(*pair, f"{where}[{index}]")
        ]
    return [] if theirs == ours else [f"{where}: {theirs!r} there, {ours!r} here"]


def is_number(value: Any) -> bool:
    """Returns whether a value is a number, truth values left out."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compare_mapping(value: Any, schema: Mapping[str, Any], where: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [
            f"{where}: must be a mapping with {sorted(schema)}, got {value!r}."
            " Write them as keys."
        ]
    unknown, missing = sorted(value.keys() - schema), sorted(schema.keys() - value)
    problems = []
    if unknown:
        problems.append(
            f"{where}: keys must be of {sorted(schema)}, got {unknown}. Correct the"
            " spelling."
        )
    if missing:
        problems.append(f"{where}: must have {missing}, got none. Add them.")
    return problems + [
        problem
        for key in sorted(schema.keys() & value.keys())
        for problem in compare(value[key], schema[key], f"{where}.{key}")
    ]


def pairs(rules: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
    """Returns JSON's lists of two as pairs.

    Raises:
      UserError: An entry that is not a pair of a name and a value.
    """
    for rule in rules:
        if len(rule) != 2 or isinstance(rule, str) or not isinstance(rule[0], str):
            raise UserError(
                f"every entry must be a pair of a name and a value, got {rule!r}. Write"
                ' (".*", "full").'
            )
    return [(rule[0], rule[1]) for rule in rules]
