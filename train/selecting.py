"""Rank selectors by name: from configs, and from the flags of binaries."""

import collections
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.selection import choosing, selectors
from lowrank_jax.selection.context import Context
from train import registry, schema

TABLE = {name: row.function for name, row in selectors.SELECTORS.items()}
"""The selectors by the name they have in configs and flags."""

BY_RANKS = ("rank", "rank_fraction", "ranks")
"""Those that look at ranks alone: what they choose of the largest model there can be is
the largest choice."""


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out the default arguments of a selector, given by name and arguments."""
    with errors.at("selector"):
        return registry.complete(spec, TABLE, positional=1)


def select(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Returns the ranks that a selector, given by name and arguments, chooses."""
    function = registry.resolve(spec["name"], TABLE, allow_imports=None)
    with errors.at("selector"), errors.at(spec["name"]):
        return choosing.choose(function, context, spec["args"])


def select_family(
    spec: Mapping[str, Any], context: Context, fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns the nested ranks that a selector chooses for several budgets; its own
    `fraction` does not matter."""
    function = registry.resolve(spec["name"], TABLE, allow_imports=None)
    args = {key: value for key, value in spec["args"].items() if key != "fraction"}
    with errors.at("selector"), errors.at(spec["name"]):
        return choosing.choose_family(function, context, args, fractions)


def define_flags() -> dict[str, flags.FlagHolder[Any]]:
    """Defines a flag for each selector of one value, and one for all by name."""
    by_name = {
        "select": flags.DEFINE_string(
            "select", None, "Any selector, by name or import path."
        ),
        "select_args": flags.DEFINE_string(
            "select_args", "{}", "With --select: its arguments, a JSON object."
        ),
    }
    return {**by_name, **define_value_flags(selectors.SELECTORS)}


def define_budget_flags() -> dict[str, flags.FlagHolder[Any]]:
    """Defines what a selector by name is told beside its other arguments."""
    share = "of the factored layers' dense %s that may stay, in (0, 1]."
    return {
        "params": flags.DEFINE_float(
            "params", None, "With --select: the share " + share % "parameters"
        ),
        "macs": flags.DEFINE_float(
            "macs", None, "With --select: the share " + share % "MACs"
        ),
        "latency": flags.DEFINE_float(
            "latency", None, "With --select: the share of the dense model's time."
        ),
        "latency_ms": flags.DEFINE_float(
            "latency_ms", None, "With --select: what a call may take, in ms."
        ),
        "family": flags.DEFINE_list(
            "family",
            None,
            "With --select: several such shares, for nested models in folders of"
            " --output.",
        ),
        "max_drop": flags.DEFINE_float(
            "max_drop",
            None,
            "With --select: the least share whose headline figure on held-out examples"
            " is no more than this worse.",
        ),
        "measure": flags.DEFINE_enum(
            "measure",
            "macs",
            ["macs", "params", "latency"],
            "What shares of --family or --max_drop are of.",
        ),
        "multiple_of": flags.DEFINE_integer(
            "multiple_of", None, "With --select: ranks are multiples of it."
        ),
    }


class Wanted(NamedTuple):
    """What a cut is to be.

    Args:
      selector: Name and arguments of a selector.
      sizes: Several values of its `fraction`; none for one cut.
      max_drop: How much worse the headline figure may be at the least `fraction`; None
        where the selector has its own.
      latency_ms: What a call of the model may take, in place of a `fraction`.
    """

    selector: Mapping[str, Any]
    sizes: Sequence[float] = ()
    max_drop: float | None = None
    latency_ms: float | None = None

    @property
    def by_time(self) -> bool:
        """Whether it is time that the budget is of."""
        return self.selector["args"].get("measure") == "latency"


def with_budget(
    selector: Mapping[str, Any], holders: Mapping[str, flags.FlagHolder[Any]]
) -> Wanted:
    """Adds to a selector what flags of `define_budget_flags` say.

    Raises:
      UserError: Several budgets, one that the selector's arguments name too, or a size
        that is no number.
    """
    values = {name: holder.value for name, holder in holders.items()}
    shares = ("params", "macs", "latency")
    named = (*shares, "latency_ms", "family", "max_drop")
    given = [name for name in named if values[name] is not None]
    if len(given) > 1:
        raise UserError(
            f"flags: at most one of {', '.join('--' + name for name in named)} may be"
            f" given, got {['--' + name for name in given]}. Keep one."
        )
    more: dict[str, Any] = {}
    sizes: list[float] = []
    for name in given:
        if name in shares:
            more |= {"measure": name, "fraction": values[name]}
        elif name == "latency_ms":
            more["measure"] = "latency"
        else:
            more["measure"] = values["measure"]
    if values["family"] is not None:
        sizes = numbers(values["family"], "--family")
    for name, share in [("family", one) for one in sizes] + [
        (name, values[name]) for name in shares if name in given
    ]:
        if not 0 < share <= 1:
            raise UserError(
                f"--{name}: must be in (0, 1], got {share}. Give a share of the cost."
            )
    if values["latency_ms"] is not None and not 0 < values["latency_ms"] < math.inf:
        raise UserError(
            f"--latency_ms: must be positive, got {values['latency_ms']}. Give ms."
        )
    folders = [f"{size:g}" for size in sizes]
    if len(set(folders)) < len(folders):
        raise UserError(f"--family: must have no size twice, got {folders}. Drop one.")
    if values["multiple_of"] is not None:
        more["multiple_of"] = values["multiple_of"]
    if twice := sorted(more.keys() & selector["args"].keys()):
        raise UserError(
            f"--select_args: must leave {twice} to the other flags, got"
            f" {dict(selector['args'])}. Name each once."
        )
    row = selectors.SELECTORS.get(selector["name"])
    if given and row is not None and row.value_type is not None:
        raise UserError(
            f"--{given[0]}: needs a selector with a budget, got {selector['name']},"
            f" which has one value. Give it as --{selector['name']}."
        )
    chosen = {**selector, "args": {**selector["args"], **more}}
    return Wanted(chosen, sizes, values["max_drop"], values["latency_ms"])


def numbers(texts: Sequence[str], where: str) -> list[float]:
    """Reads the numbers of a list flag, one at least.

    Raises:
      UserError: There is none, or something else.
    """
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = []
    if not found:
        raise UserError(
            f"{where}: must be numbers with commas between, got"
            f" {','.join(texts)!r}. Mend it."
        )
    return found


def define_value_flags(names: Iterable[str]) -> dict[str, flags.FlagHolder[Any]]:
    """Defines a flag for each of some selectors that is of one value."""
    holders: dict[str, flags.FlagHolder[Any]] = {}
    makers: dict[Any, Callable[..., flags.FlagHolder[Any]]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        Mapping: flags.DEFINE_string,  # a JSON file
    }
    for name in names:
        row = selectors.SELECTORS[name]
        if row.value_type is not None:
            help_text = row.help
            if row.value_type is Mapping:
                help_text += " A JSON file {path: rank}."
            holders[name] = makers[row.value_type](name, None, help_text)
    return holders


def from_flags(holders: Mapping[str, flags.FlagHolder[Any]]) -> dict[str, Any]:
    """Returns the one selector that the flags give, as name and arguments.

    Raises:
      UserError: None or several are given, or a rank file is not there.
    """
    given = _given(holders)
    if len(given) != 1:
        raise _not_one("exactly one", holders, given)
    ((name, value),) = given.items()
    if name == "select":
        args = _read_object(holders["select_args"].value, "--select_args")
        return {"name": value, "args": args}
    return _of_value(name, value)


def from_value_flags(
    holders: Mapping[str, flags.FlagHolder[Any]],
) -> dict[str, Any] | None:
    """Returns the selector that flags of `define_value_flags` give, None for none.

    Raises:
      UserError: Several are given, or a rank file is not there.
    """
    given = _given(holders)
    if len(given) > 1:
        raise _not_one("at most one", holders, given)
    return next((_of_value(name, value) for name, value in given.items()), None)


def _given(holders: Mapping[str, flags.FlagHolder[Any]]) -> dict[str, Any]:
    values = {name: holder.value for name, holder in holders.items()}
    values.pop("select_args", None)  # which has a default
    return {name: value for name, value in values.items() if value is not None}


def _not_one(
    how_many: str, holders: Mapping[str, Any], given: Mapping[str, Any]
) -> UserError:
    names = ", ".join(f"--{name}" for name in holders if name != "select_args")
    return UserError(
        f"flags: {how_many} of {names} must be given, got"
        f" {[f'--{name}' for name in given]}. Keep one."
    )


def _of_value(name: str, value: Any) -> dict[str, Any]:
    if selectors.SELECTORS[name].value_type is Mapping:
        value = read_rank_file(value, f"--{name}")
    return {"name": name, "args": {"value": value}}


def read_rank_file(path: str | Path, where: str) -> dict[str, Any]:
    """Reads ranks by path from a JSON file.

    Raises:
      UserError: It is not there or not a JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, or not text
        raise UserError(
            f"{where}: must be a JSON file of {{path: rank}}, got {path} ({error})."
            " Check the path."
        ) from error
    return _read_object(text, f"{where}: {path}")


def _read_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: must be JSON, got {text[:80]!r} ({error}). Mend it."
        ) from error
    errors.raise_all(schema.foreign(value, where))
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, got {value!r}. Mend it.")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; of a name that comes twice, JSON drops the first in silence."""
    counts = collections.Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"names that come more than once: {twice}")
    return dict(pairs)
