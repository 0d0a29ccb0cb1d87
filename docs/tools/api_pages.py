"""The pages of the API: one for each public module, every public name by its docstring.

What is public is what `__all__` says or, without one, what the module defines itself
under a name that does not begin with an underscore.
"""

import importlib
import sys
import types
from collections.abc import Iterator

MODULES = {
    "lowrank_jax": "Models: factorize, cut, count",
    "lowrank_jax.layers": "Layers",
    "lowrank_jax.samplers": "Samplers",
    "lowrank_jax.penalties": "Penalties",
    "lowrank_jax.projections": "Projections",
    "lowrank_jax.selection": "Selection",
    "lowrank_jax.checkpoint": "Checkpoints",
    "lowrank_jax.export": "Export",
    "lowrank_jax.calibration": "Calibration",
    "lowrank_jax.elastic": "Elastic serving",
    "lowrank_jax.latency": "Latency",
    "lowrank_jax.errors": "Errors",
}
"""The title of each module's page."""


def pages() -> dict[str, str]:
    """Returns the pages by their path under docs/."""
    made = {path_of(module): _page(module, title) for module, title in MODULES.items()}
    return {"reference/api/index.md": _index(), **made}


def path_of(module: str) -> str:
    """Returns the path of a module's page.

    Args:
      module: Dotted.
    """
    return f"reference/api/{module.removeprefix('lowrank_jax.')}.md"


def public_names(module: types.ModuleType) -> list[str]:
    """Lists what a module offers, modules left out.

    Args:
      module: Imported.
    """
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
        ]
    return [
        name
        for name in names
        if not name.startswith("_")
        and not isinstance(getattr(module, name), types.ModuleType)
    ]


def place_of(module: types.ModuleType, name: str) -> str:
    """Returns where Griffe finds a name: not in its package where a file has it too.

    Args:
      module: Imported.
      name: One of its public names.
    """
    place = f"{module.__name__}.{name}"
    if place in sys.modules:
        return f"{getattr(module, name).__module__}.{name}"
    return place


def _index() -> str:
    lines = ["# API", "", "`import lowrank_jax as lr`; made from the docstrings.", ""]
    lines += ["| module | what it holds |", "|---|---|"]
    for module in MODULES:
        doc = (importlib.import_module(module).__doc__ or "").strip()
        first = " ".join(doc.partition("\n\n")[0].split())
        file = path_of(module).removeprefix("reference/api/")
        lines.append(f"| [`{module}`]({file}) | {first} |")
    return "\n".join(lines) + "\n"


def _page(module: str, title: str) -> str:
    return "\n".join([f"# {title}", "", *_blocks(module)]) + "\n"


def _blocks(module: str) -> Iterator[str]:
    """The module's own docstring, then its names; of its modules, the same."""
    yield f"::: {module}"
    yield "    options: { members: false, heading_level: 2 }"
    yield ""
    found = importlib.import_module(module)
    for name in public_names(found):
        yield f"::: {place_of(found, name)}"
        yield f"    options: {{ heading_level: 3, heading: {module}.{name} }}"
        yield ""
    for name in getattr(found, "__all__", ()):
        inner = f"{module}.{name}"
        if isinstance(getattr(found, name), types.ModuleType) and inner not in MODULES:
            yield from _blocks(inner)
