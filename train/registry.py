"""From a name in a config to the function that it stands for.

Short names come from a literal table of import paths, so that listing them imports
nothing. Users reach their own code with an import path, `package.module:function`.
Importing runs code: a path read from a checkpoint needs the user's consent.

Nothing here knows where in a config it is: callers put the place in front of a mistake
with `errors.at("config.model")`. Errors of the functions themselves pass through.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lowrank_jax import errors
from lowrank_jax.errors import UserError, nearest, unknown
from train.schema import check_values

Table = Mapping[str, str | Callable[..., Any]]
"""A function or its import path, `package.module:function`, for each short name."""


def resolve(
    name: str, table: Table, *, allow_imports: Sequence[str] | None
) -> Callable[..., Any]:
    """Returns the function that a name stands for.

    Args:
      name: A key of the table, or an import path `package.module:function`.
      table: The functions that have a short name.
      allow_imports: Top-level packages that `name` may import from, or None for any.
        Pass None for the user's own config only, never for a checkpoint's.

    Raises:
      UserError: The name is unknown, its package is not allowed, or there is no
        function at its import path.
    """
    if name in table:
        entry = table[name]
        return entry if callable(entry) else _import(entry)
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        what = "a known name or an import path 'package.module:function'"
        fix = "Choose one, or give the import path of your own function."
        raise UserError(f"name: {unknown(what, name, sorted(table), fix=fix)}")
    package = module_name.split(".")[0]
    if allow_imports is not None and package not in list(allow_imports):
        raise UserError(
            f"name: must be one of {', '.join(sorted(table))} or come from an allowed"
            f" package, got {name!r}. Importing it runs its code: if you trust it, pass"
            f" --allow_imports={package}."
        )
    return _import(name)


def build(
    spec: Mapping[str, Any],
    table: Table,
    /,
    *positional: Any,
    allow_imports: Sequence[str] | None = None,
    **extra: Any,
) -> Any:
    """Calls the function that a spec names with the spec's arguments.

    Args:
      spec: A choice in a config, `{"name": ..., "args": {...}}`.
      table: The functions that have a short name.
      *positional: Arguments to put in front.
      allow_imports: As in `resolve`.
      **extra: Keyword arguments that the config does not give.

    Raises:
      UserError: As in `resolve`, or arguments that the function does not take.

    >>> build({"name": "power", "args": {"exp": 3}}, {"power": pow}, 2)
    8
    """
    function = resolve(spec["name"], table, allow_imports=allow_imports)
    parameters = _options(function, len(positional))
    errors.raise_all(check_values(parameters, spec["args"]))
    # what says the same as the default is left to it: JSON has lists, code has tuples
    defaults = complete({**spec, "args": {}}, {spec["name"]: function})["args"]
    args = {
        name: value
        for name, value in spec["args"].items()
        if name not in defaults or defaults[name] != value
    }
    return call(function, *positional, **{**extra, **args})


def build_checked(
    spec: Mapping[str, Any], table: Table, check: Callable[[Any], bool]
) -> Any:
    """Builds as `build`, and checks what the function returned.

    Raises:
      UserError: As `build`, or the function made something of another kind.
    """
    value = build(spec, table)
    check_kind(spec, table, value, check)
    return value


def check_kind(
    spec: Mapping[str, Any], table: Table, value: Any, check: Callable[[Any], bool]
) -> None:
    """Raises UserError where a function made something of another kind."""
    if not check(value):
        raise UserError(
            "name: must be a function that makes what"
            f" {', '.join(sorted(table))} make, got {spec['name']!r}, which made a"
            f" {type(value).__name__}. Return one of that kind."
        )


def call(function: Callable[..., Any], /, *positional: Any, **args: Any) -> Any:
    """Calls a function; arguments that it does not take are a mistake of the user.

    Raises:
      UserError: Unknown or missing arguments, with the known ones.
    """
    known = _options(function, len(positional))
    every = inspect.signature(function).parameters
    taken = any(p.kind is p.VAR_KEYWORD for p in known.values())
    errors.raise_all(
        [
            f"args: {unknown(_arguments_of(function), name, known)}"
            for name in args
            if name not in every and not taken
        ]
    )
    try:
        inspect.signature(function).bind(*positional, **args)
    except TypeError as error:
        raise UserError(
            f"args: must be arguments of {_name_of(function)} ({list(known)}), got"
            f" {sorted(args)}: {error}. Correct them."
        ) from error
    return function(*positional, **args)


def complete(
    spec: Mapping[str, Any],
    table: Table,
    *,
    positional: int = 0,
    supplied: Collection[str] = (),
    allow_imports: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes every argument of a choice out, so that no default stays hidden.

    Args:
      spec: A choice in a config, `{"name": ..., "args": {...}}`.
      table: The functions that have a short name.
      positional: How many arguments the caller puts in front.
      supplied: Parameters that the caller gives itself, such as "rngs".
      allow_imports: As in `resolve`.

    Returns:
      The spec with, among its arguments, the defaults of the function's signature that
      JSON can hold; tuples become lists. Others, such as functions, are left out.

    Raises:
      UserError: As in `resolve`, or arguments that the function does not take.

    >>> complete({"name": "sum", "args": {}}, {"sum": sum}, positional=1)
    {'name': 'sum', 'args': {'start': 0}}
    """
    function = resolve(spec["name"], table, allow_imports=allow_imports)
    options = _options(function, positional)
    taken = any(p.kind is p.VAR_KEYWORD for p in options.values())
    open_names = [
        name
        for name, option in options.items()
        if name not in supplied
        and option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
    ]
    errors.raise_all(
        [
            f"args: {unknown(_arguments_of(function), name, open_names)}"
            for name in spec["args"]
            if name in supplied or (name not in open_names and not taken)
        ]
    )
    defaults = {name: options[name].default for name in open_names}
    recorded = {
        name: _to_json(default)
        for name, default in defaults.items()
        if default is not inspect.Parameter.empty and _is_json(default)
    }
    return {**spec, "args": {**recorded, **spec["args"]}}


def _options(
    function: Callable[..., Any], positional: int
) -> dict[str, inspect.Parameter]:
    """The parameters that are left after so many positional arguments."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # some that are written in C
        raise UserError(
            f"name: must be a function whose arguments are known, got {function!r}."
            " Write one in Python that calls it."
        ) from error
    return dict(list(parameters.items())[positional:])


def _name_of(function: Callable[..., Any]) -> str:
    """A name for messages; a partial or an object that is called has none."""
    return getattr(function, "__name__", None) or repr(function)


def _arguments_of(function: Callable[..., Any]) -> str:
    return f"an argument of {_name_of(function)}"


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def _to_json(value: Any) -> Any:
    """The value with tuples as lists, as it comes back from a file."""
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def _import(path: str) -> Callable[..., Any]:
    """Imports the function at `path`, given as `package.module:function`."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"name: must be the import path of a function, got {path!r} ({error})."
            " Correct the path, install the package or add its folder to PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        meant = nearest(attribute, [k for k, v in vars(module).items() if callable(v)])
        raise UserError(
            f"name: must be the import path of a function, got {path!r}"
            f" ({module_name} has no function {attribute!r})."
            + (f" Did you mean {meant!r}?" if meant else " Correct the path.")
        )
    return function
