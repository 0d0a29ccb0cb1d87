"""Ordered (path pattern, value) rules: the first pattern that matches a path decides.

A path is `"/"`-joined, a pattern a regular expression that must match the whole of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

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
    patterns = [_compile(pattern) for pattern, _ in rules]
    values, used = {}, [False] * len(patterns)
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


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"a pattern must be a regular expression, got {pattern!r}"
            f" ({error}). Escape special characters with a backslash."
        ) from error
