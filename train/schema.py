"""The little language in which configs are described, and their comparison with it.

A schema is a type (`int`, `str`, `list`, ...; `float` takes whole numbers too) or a
mapping from keys to schemas. Every key is present in a config, and no other: a
misspelled key is an error, not a default.
"""

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.errors import UserError, nearest, unknown

NAMED = {"name": str, "args": dict}
"""A choice from a table, or an import path, and its arguments."""

DEEPEST = 32
"""Lists and mappings in one another; deeper ones come of a mistake, and end in a
recursion that is too deep wherever they are read."""

LARGEST = 2**31 - 1
"""Of a whole number: steps, sizes and ranks are counted in int32."""


def foreign(value: Any, where: str, depth: int = 0) -> list[str]:
    """Lists what is not JSON in a value, or cannot be counted or written down."""
    kind = type(value).__name__
    if isinstance(value, Mapping | list | tuple):
        if depth == DEEPEST:
            return [
                f"{where}: must be nested at most {DEEPEST} deep, got a {kind} in it."
                " Flatten it."
            ]
        mapping = isinstance(value, Mapping)
        if mapping and not all(isinstance(key, str) for key in value):
            return [f"{where}: must have names for keys, got others. Write text."]
        return [
            problem
            for key, part in (value.items() if mapping else enumerate(value))
            for problem in foreign(
                part, f"{where}.{key}" if mapping else f"{where}[{key}]", depth + 1
            )
        ]
    if isinstance(value, str) and not _is_unicode(value):
        return [f"{where}: must be text in Unicode, got {value!r}. Write it anew."]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where}: must be a finite number, got {value}. Give one."]
    if isinstance(value, int) and abs(value) > LARGEST:
        size = f"{value:,}" if abs(value) < 2**64 else "a larger one"
        return [f"{where}: must be at most {LARGEST:,} in size, got {size}. Lower it."]
    if value is not None and not isinstance(value, str | int | float):
        return [
            f"{where}: must hold JSON values only, got a {kind}. Name functions by"
            " import path."
        ]
    return []


def _is_unicode(text: str) -> bool:
    """Whether text can be written to a file: half of a surrogate pair cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def takes(annotation: Any, value: Any) -> bool:
    """Returns whether a parameter with this annotation takes a value of JSON.

    Only what is plain is checked: numbers, text, lists, mappings, None and unions with
    them. Any other annotation takes all.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    kind = origin or annotation
    if kind in (typing.Union, types.UnionType):
        plain = [part for part in parts if _is_plain(part)]
        if not plain:  # beside None, a class that may well be made of JSON
            return True
        return any(takes(part, value) for part in (*plain, None) if part in parts)
    if kind in _SCALARS:
        return isinstance(value, _SCALARS[kind]) and (
            kind is bool or not isinstance(value, bool)
        )
    if kind in (None, types.NoneType):
        return value is None
    if kind in _MAPPINGS:
        values = value.values() if isinstance(value, Mapping) else None
        return values is not None and (
            not parts or all(takes(parts[1], part) for part in values)
        )
    if kind in _LISTS:
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and parts and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(takes, parts, value))
        return not parts or all(takes(parts[0], part) for part in value)
    return True


_MOST_SHOWN = 120
_SCALARS = {bool: bool, int: int, float: int | float, str: str}
_MAPPINGS = (dict, collections.abc.Mapping)
_LISTS = (list, tuple, collections.abc.Sequence)


def _is_plain(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return kind in (*_SCALARS, *_MAPPINGS, *_LISTS)


def check_values(
    parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]
) -> list[str]:
    """Lists the arguments whose values are not of their parameters' types."""
    return [
        f"{name}: must be of type {_shown(parameters[name].annotation)}, got"
        f" {value!r}. Give one of that type."
        for name, value in values.items()
        if name in parameters and not takes(parameters[name].annotation, value)
    ]


def _shown(annotation: Any) -> str:
    return inspect.formatannotation(annotation).replace("collections.abc.", "")


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


def keys(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the keys of a schema in order, those of mappings in it by dotted paths.

    >>> keys({"seed": int, "data": {"name": str}})
    ['seed', 'data', 'data.name']
    """
    found = []
    for name, part in schema.items():
        found.append(f"{prefix}{name}")
        if isinstance(part, Mapping):
            found += keys(part, f"{prefix}{name}.")
    return found


def difference(theirs: Any, ours: Any, where: str = "config") -> list[str]:
    """Lists the places where two configs, or facts, differ, with both values."""
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
    if theirs == ours:
        return []
    return [f"{where}: {_shortened(theirs)} there, {_shortened(ours)} here"]


def _shortened(value: Any) -> str:
    """The value, or of a long one, such as a tokenizer's merges, its beginning."""
    text = repr(value)
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


def is_number(value: Any) -> bool:
    """Returns whether a value is a number, truth values left out."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compare_mapping(value: Any, schema: Mapping[str, Any], where: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [
            f"{where}: must be a mapping with {sorted(schema)}, got {value!r}."
            " Write them as keys."
        ]
    strange, missing = sorted(value.keys() - schema), sorted(schema.keys() - value)
    problems = []
    for key in strange:
        meant = nearest(key, missing)  # misspelled, it is missing as well
        if meant is not None:
            missing.remove(meant)
        known = [meant] if meant is not None else sorted(schema)
        problems.append(f"{where}: every key {unknown('known', key, known)}")
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
        pair = isinstance(rule, list | tuple) and len(rule) == 2
        if not pair or not isinstance(rule[0], str):
            raise UserError(
                f"every entry must be a pair of a name and a value, got {rule!r}. Write"
                ' (".*", "full").'
            )
    return [(rule[0], rule[1]) for rule in rules]
