"""From a name in a config to the function that it stands for.

Short names come from a literal table of import paths, so that listing them imports
nothing. Users reach their own code with an import path, `package.module:function`.
Importing runs code: a path read from a checkpoint needs the user's consent.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_jax.errors import UserError


def resolve(
    kind: str,
    name: str,
    table: Mapping[str, str | Callable[..., Any]],
    *,
    allow_imports: Sequence[str] | None,
) -> Callable[..., Any]:
    """Returns the function that `name` stands for.

    Args:
        kind: Section of the config that holds the name; "model" makes errors say
            `config.model.name`.
        name: A key of `table`, or an import path `package.module:function`.
        table: Function or import path of each short name.
        allow_imports: Top-level packages that `name` may import from, or None for any.
            Pass None for the user's own config only, never for a checkpoint's.

    Raises:
        ValueError: The name is unknown, its package is not allowed, or there is no
            function at its import path.
    """
    where = f"config.{kind}.name"
    if name in table:
        entry = table[name]
        return entry if callable(entry) else _import(where, entry)
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(
            f"{where}: must be one of {', '.join(sorted(table))} or an import path "
            f"'package.module:function', got {name!r}. Correct the spelling, or give "
            "the import path of your own function."
        )
    package = module_name.split(".")[0]
    if allow_imports is not None and package not in list(allow_imports):
        raise UserError(
            f"{where}: must be one of {', '.join(sorted(table))} or come from an "
            f"allowed package, got {name!r}. Importing it runs its code: if you trust "
            f"it, pass --allow_imports={package}."
        )
    return _import(where, name)


def build(
    kind: str,
    spec: Mapping[str, Any],
    table: Mapping[str, str | Callable[..., Any]],
    *,
    positional: Sequence[Any] = (),
    allow_imports: Sequence[str] | None = None,
    **extra: Any,
) -> Any:
    """Resolves `spec["name"]` and calls it with `spec["args"]`.

    Args:
        kind: Section of the config that `spec` is.
        spec: A name and the arguments of a choice.
        table: As in `resolve`.
        positional: Arguments to put in front.
        allow_imports: As in `resolve`.
        **extra: Keyword arguments that the config does not give.
    """
    function = resolve(kind, spec["name"], table, allow_imports=allow_imports)
    return call(f"config.{kind}", function, positional, {**extra, **spec["args"]})


def call(
    where: str,
    function: Callable[..., Any],
    positional: Sequence[Any],
    args: Mapping[str, Any],
) -> Any:
    """Calls a function; arguments it does not take are one clear error."""
    signature = inspect.signature(function)
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        known = [name for name in signature.parameters][len(positional) :]
        raise UserError(
            f"{where}.args: must be arguments of {function.__name__} ({known}), got"
            f" {sorted(args)}: {error}. Correct them."
        ) from error
    try:
        return function(*positional, **args)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _import(where: str, path: str) -> Callable[..., Any]:
    """Imports the function at `path`, given as `package.module:function`."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{where}: must be the import path of a function, got {path!r} ({error}). "
            "Correct the path, install the package or add its folder to PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"{where}: must be the import path of a function, got {path!r} "
            f"({module_name} has no function {attribute!r}). Correct the path."
        )
    return function
