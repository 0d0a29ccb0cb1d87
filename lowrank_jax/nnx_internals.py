"""All that this library knows of the inside of Flax NNX, in one file.

A module keeps its attributes in `vars(module)`, beside bookkeeping of its own under
names that begin with `_pytree`. A change of Flax there is mended here alone.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

from flax import nnx

_BOOKKEEPING = "_pytree"

split: Callable[..., tuple[Any, ...]] = nnx.split
"""As Flax's, whose declared type, so many parts or more, cannot be unpacked."""


def attributes(module: nnx.Module) -> dict[str, Any]:
    """Returns the attributes of a module, without NNX's bookkeeping."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith(_BOOKKEEPING)
    }


def blank(cls: type[nnx.Module]) -> Any:
    """Returns an instance of an NNX class whose own `__init__` has not run."""
    return change_type(_blank_type(cls)(), cls)


@functools.cache
def _blank_type(cls: type[nnx.Module]) -> type[nnx.Module]:
    return type(cls.__name__, (cls,), {"__init__": lambda self: None})


def change_type(module: nnx.Module, cls: type[nnx.Module]) -> Any:
    """Makes a module an instance of another class, in place; returns it."""
    object.__setattr__(module, "__class__", cls)
    return module


def copy_attributes(
    source: nnx.Module, target: nnx.Module, *, without: Collection[str]
) -> None:
    """Sets the target's attributes to the source's; data stay data (a None too)."""
    is_data = getattr(source, "_pytree__nodes", {"bias": True})
    for name, value in attributes(source).items():
        if name not in without:
            data = name in is_data and is_data[name]
            setattr(target, name, nnx.data(value) if data else value)


def view_as(cls: type[nnx.Module], module: nnx.Module, **changes: Any) -> Any:
    """Returns an object of a class with the module's attributes, some replaced.

    It shares everything with the module and is meant for one call of a method.
    """
    view = object.__new__(cls)
    vars(view).update({**vars(module), **changes})
    return view


def wrapping_calls(
    cls: type[nnx.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> type[nnx.Module]:
    """Makes a subclass whose calls, `attend` of a table included, are wrapped."""
    methods = {
        name: wrap(getattr(cls, name))
        for name in ("__call__", "attend")
        if hasattr(cls, name)
    }
    return type(cls.__name__, (cls,), methods)
