"""Values that break things, put at every place of a valid one, and a campaign of them.

A case is a valid JSON value by name and a few edits, each a place and what stands
there instead. What it ends in is the test's affair.
"""

import contextlib
import copy
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from messages import check_form

from lowrank_jax.errors import UserError

Place = Sequence[Any]
"""Keys and indices from the top down, such as ("phases", 0, "until")."""

Edits = Sequence[tuple[Place, Any]]
"""Places, and what to put there; `...` deletes."""

SECONDS = 60
"""What takes longer hangs: most cases take a hundredth of a second."""

EXAMPLES = {
    "configs": 300,
    "starts": 8,
    "ranks": 60,
    "rules": 60,
    "metadata": 80,
    "rank files": 40,
}
"""How many cases each campaign generates; those that are known come on top."""

TIMES = pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
"""How many times as many cases as in every run of the tests."""

NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, -(2**31) - 1, 2**63, 10**30)
FLOATS = (0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e300, math.nan, math.inf, -math.inf)
PATTERNS = (
    "(",
    "[",
    "\\",
    "*",
    "(?P<n>.)(?P<n>.)",
    "a{99999999999999999999}",
    "(a+)+$",
    "(.*)*x",
    "(.|/)*z",
    "(.+)\\1+x",
    ".*" * 40 + "x",
    ".?" * 60 + "x",
    "(" * 3000 + ")" * 3000,
    "(?=",
    "",
)
NAMES = (
    "os:no_such_function",
    "math:pi",
    "math:sqrt",
    "builtins:dict",
    "builtins:int",
    "collections:OrderedDict",
    "types:SimpleNamespace",
    "no_such_package_q7:build",
    "json.no_such_module:build",
    "json:",
    ":json",
    ":",
    "..json:loads",
    "json:loads:dumps",
    "full",
    "none",
    "selected",
    "rank",
    "adam",
    "l1",
    "merge",
    "digits",
)
TEXTS = (
    "",
    " ",
    "x",
    "é\u202e\u0000",
    "\ud800",
    "a\0b",
    "../../..",
    "/",
    "~nobody_q7",
    "x" * 5000,
    "x/" * 3000,
    "1",
    "nan",
    "{}",
    "%s%n",
)


def nested(depth: int, kind: type = list) -> Any:
    """A list in a list in a list, or mappings."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind is list else {"name": value}
    return value


JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    *NUMBERS,
    *FLOATS,
    *PATTERNS,
    *NAMES,
    *TEXTS,
    [],
    {},
    [[]],
    [None],
    [True],
    [math.nan],
    ["a", 1],
    [1, [2, 3]],
    [0.5, 10**30],
    {"": 0},
    {"name": "full"},
    {"name": "full", "args": {}},
    {"name": "full", "args": []},
    {"name": "full", "args": {"": 1}},
    {"name": ["full"], "args": {}},
    {"name": "types:SimpleNamespace", "args": {"s": 3}},
    [[".*", "full"]],
    [["(", "full"]],
    {"max_rank": 2},
    nested(3),
    nested(300),
    {"head": -1},
    {"no_such_layer": 2},
    {"head": [[1], [2, 3]]},
)
UNREADABLE: dict[str, Any] = {
    "a set": {1},
    "bytes": b"x",
    "an object": object(),
    "a complex number": 1j,
    "a function": len,
    "keys that are numbers": {1: 2},
    "a range": range(3),
    "a list without an end": nested(100_000),
    "mappings without an end": nested(100_000, dict),
    "a number of 5,001 digits": 10**5000,
}
"""What no JSON has, or what cannot be shown."""


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, mappings and lists before what is in them."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        yield (*place, key)
        yield from places(part, (*place, key))


def at(value: Any, place: Place) -> Any:
    """What stands at a place."""
    for key in place:
        value = value[key]
    return value


def changed(value: Any, edits: Edits) -> Any:
    """The value with these edits; those at a place that another took away are left."""
    value = copy.deepcopy(value)
    for (*parents, last), new in edits:
        with contextlib.suppress(LookupError, TypeError):
            node = at(value, parents)
            if new is ...:
                del node[last]
            else:
                node[last] = copy.deepcopy(new)
    return value


def edit(value: Any, place: Place) -> st.SearchStrategy[tuple[Place, Any]]:
    """One edit at a place: of what stands there, or junk in its stead."""
    here = at(value, place)
    own = [st.just(...)]
    if isinstance(here, bool):
        own += [st.just(not here), st.integers(0, 1)]
    elif isinstance(here, int | float):
        own += [st.sampled_from(NUMBERS + FLOATS), st.just(-here), st.just(str(here))]
        own += [st.integers(-3, 70), st.floats(width=32)]
    elif isinstance(here, str):
        own += [st.sampled_from(TEXTS + NAMES + PATTERNS), st.text(max_size=8)]
        own += [st.sampled_from([here.upper(), here + " ", here[:-1], [here]])]
    elif isinstance(here, list):
        own += [st.just(here[:-1]), st.just(here + here[:1]), st.just([here])]
        own += [st.sampled_from(JUNK).map(lambda junk: [*here, junk])]
        own += [st.sampled_from(JUNK).map(lambda junk: [junk, *here[1:]])]
        own += [st.lists(st.integers(-2, 9) | st.floats(0, 2), max_size=3)]
    elif isinstance(here, Mapping):
        own += [st.just(list(here)), st.just(dict(list(here.items())[1:]))]
        own += [st.just({f"{key}_": part for key, part in here.items()})]
        own += [
            st.tuples(st.sampled_from(TEXTS + NAMES), st.sampled_from(JUNK)).map(
                lambda pair: {**here, pair[0]: pair[1]}
            )
        ]
    others = st.sampled_from(list(places(value))).map(lambda other: at(value, other))
    junk = st.sampled_from(JUNK)
    return st.tuples(st.just(place), st.one_of(*own, others, junk))


def edits(value: Any, most: int = 2) -> st.SearchStrategy[list[tuple[Place, Any]]]:
    """A few edits of a JSON value, at any of its places."""
    one = st.sampled_from(list(places(value))).flatmap(lambda place: edit(value, place))
    return st.lists(one, min_size=1, max_size=most)


def campaign(
    check: Callable[[Any], None],
    cases: st.SearchStrategy[Any],
    name: str,
    times: int,
    known: Sequence[Any] = (),
) -> None:
    """Checks generated cases, the same in every run, and those that are known.

    Args:
      check: Raises for a case that did not end as it must.
      cases: What is generated.
      name: Of the campaign, a key of `EXAMPLES`.
      times: How many times as many cases as there.
      known: What went wrong once.
    """
    tried, count = 0, times * EXAMPLES[name]

    def counted(case: Any) -> None:
        nonlocal tried
        tried += 1
        with _bounded():
            check(case)

    run = hypothesis.given(cases)(counted)
    for case in known:
        run = hypothesis.example(case)(run)
    hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(run)()
    assert tried >= count + len(known)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise AssertionError(f"hangs: not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(function: Callable[[], Any]) -> bool:
    """Calls a function, which may refuse with one error of ours and with no other.

    Returns:
      Whether it did.
    """
    try:
        function()
    except UserError as error:
        check_form(str(error))
        return True
    return False
