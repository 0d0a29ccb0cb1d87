"""Ordered (path pattern, value) rules: the first pattern that matches a path decides.

A path is `"/"`-joined, a pattern a regular expression that must match the whole of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from re import _constants as codes  # type: ignore[attr-defined]  # no stubs for them
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeVar

from lowrank_jax.errors import UserError

Value = TypeVar("Value")


def match_rules(
    rules: Sequence[tuple[str, Value]],
    paths: Iterable[str] | Mapping[str, Sequence[str]],
) -> dict[str, Value]:
    """Returns the value of the first rule that matches each path.

    Args:
      rules: Ordered pairs of a regular expression and a value.
      paths: What to match: paths, or each path with all its names (a module that is
        reachable in several ways), of which any may match.

    Raises:
      UserError: A path that no rule covers, a rule that matches no path at all, or a
        pattern that is not a regular expression; all offenders are named.

    >>> match_rules([("head", "dense"), (".*", 0.5)], ["body/0", "head"])
    {'body/0': 0.5, 'head': 'dense'}
    """
    names = paths if isinstance(paths, Mapping) else {path: [path] for path in paths}
    patterns = [compile_pattern(pattern) for pattern, _ in rules]
    values: dict[str, Value] = {}
    used = [False] * len(patterns)
    for path, aliases in names.items():
        for index, pattern in enumerate(patterns):
            if any(pattern.fullmatch(alias) for alias in aliases):
                used[index] = True
                values.setdefault(path, rules[index][1])
    uncovered = [path for path in names if path not in values]
    unused = [rules[n][0] for n, hit in enumerate(used) if not hit]
    if uncovered:
        raise UserError(
            f"every layer must be covered by a rule, got none for {uncovered}. Add a"
            " rule, such as ('.*', 'dense') at the end."
        )
    if unused:
        raise UserError(
            f"every rule must match a layer, got no match for {unused} among"
            f" {sorted(names)}. Patterns must match the whole path; remove or mend"
            " them."
        )
    return values


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compiles a regular expression for whole paths.

    Raises:
      UserError: It is none, or one that may take ages: Python tries every way in which
        repetitions can share out a path.

    >>> compile_pattern("(.*/)?conv[0-9]+").fullmatch("blocks/0/conv12") is not None
    True
    """
    try:
        choices = _choices(parser.parse(text))
        if choices <= _MOST_CHOICES:
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"a pattern must be a regular expression, got {_shortened(text)}"
            f" ({error}). Escape special characters with a backslash."
        ) from error
    raise UserError(
        f"a pattern must have at most {_MOST_CHOICES} repetitions, none of them in"
        f" another, got {_shortened(text)}. Write one '.*' for several, or several"
        " rules."
    )


_MOST_CHOICES = 5
"""A path of n characters is shared out among k repetitions in about n^k / k! ways."""


def _choices(parsed: Any) -> float:
    """Counts the repetitions that share out a text; infinite if one is in another."""
    total = 0.0
    for code, argument in parsed:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, body = argument
            inner = _choices(body)
            branches = any(code is codes.BRANCH for code, _ in _nodes(body))
            if most > 1 and (inner or branches):
                return float("inf")
            total += inner + (least != most)
        elif code is codes.BRANCH:
            total += max(map(_choices, argument[1]))
        else:  # groups, assertions, conditions: what they hold, else nothing
            total += sum(map(_choices, _parts(argument)))
    return total


def _nodes(parsed: Any) -> Iterable[tuple[Any, Any]]:
    """Yields every node of a parsed pattern."""
    for code, argument in parsed:
        yield code, argument
        for part in _parts(argument):
            yield from _nodes(part)


def _parts(argument: Any) -> list[Any]:
    """Lists the patterns in what a node of a parsed pattern holds."""
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, list | tuple):
        return [part for item in argument for part in _parts(item)]
    return []


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
