"""Finding and replacing the nodes of any Flax NNX model.

A path is the `"/"`-joined NNX path of a layer, the same in rules, logs, errors, rank
files and checkpoints.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax import nnx

from lowrank_jax.factors import Factors
from lowrank_jax.layers import LAYERS, LowRankLayer


def find_layers(model: nnx.Module) -> dict[str, tuple[nnx.Module, list[str]]]:
    """All layers that have, or can have, a low-rank form.

    Returns:
      For each layer, under its first path in sorted order, the layer and all its paths
      (a module that is shared has several).
    """
    found: dict[int, tuple[nnx.Module, list[str]]] = {}
    for path, node in walk(model):
        if type(node) in LAYERS or isinstance(node, LowRankLayer):
            found.setdefault(id(node), (node, []))[1].append(path)
    return {paths[0]: (layer, paths) for layer, paths in found.values()}


def find_factors(model: nnx.Module) -> dict[str, Factors]:
    """All `Factors` of a model by the path of their layer, each once.

    Factors that several layers share stand under their first path.
    """
    found: dict[int, tuple[str, Factors]] = {}
    for path, node in walk(model):
        if isinstance(node, Factors):
            found.setdefault(id(node), (_layer_path(path), node))
    return dict(found.values())


def find_aliases(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared factors: `{path: path in find_factors}`."""
    first: dict[int, str] = {}
    aliases = {}
    for path, node in walk(model):
        if isinstance(node, Factors):
            path = _layer_path(path)
            if first.setdefault(id(node), path) != path:
                aliases[path] = first[id(node)]
    return aliases


def _layer_path(path: str) -> str:
    return path.removesuffix("factors").removesuffix("/")


def walk(root: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Every reference to a node in sorted order, a shared one at each of its paths."""

    def visit(node: Any, parts: tuple[str, ...], parents: tuple[int, ...]):
        if id(node) in parents:  # a cycle in the graph
            return
        yield "/".join(parts), node
        for key, child in _children(node):
            yield from visit(child, (*parts, str(key)), (*parents, id(node)))

    yield from visit(root, (), ())


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Mapping):  # keys may be of several types
        return sorted(node.items(), key=lambda item: str(item[0]))
    if isinstance(node, list | tuple | nnx.List):
        return enumerate(node)
    if isinstance(node, nnx.Module):
        return sorted(
            (name, value)
            for name, value in vars(node).items()
            if not name.startswith("_pytree")
        )
    return ()


def replace(
    root: nnx.Module, replacement: Callable[[Any], nnx.Module | None]
) -> nnx.Module:
    """Replaces nodes in place, shared ones by the same new one; returns the root."""
    done: dict[int, Any] = {}

    def visit(node: Any) -> Any:
        if id(node) in done:
            return done[id(node)]
        new = replacement(node)
        done[id(node)] = node if new is None else new
        if new is not None:
            return new
        children = [(key, child, visit(child)) for key, child in _children(node)]
        if all(new is child for _, child, new in children):
            return node
        if isinstance(node, tuple):
            done[id(node)] = tuple(new for _, _, new in children)
            return done[id(node)]
        for key, child, new in children:
            if new is child:
                continue
            if isinstance(node, list | Mapping | nnx.List):
                node[key] = new
            else:
                setattr(node, key, nnx.data(new))
        return node

    return visit(root)
