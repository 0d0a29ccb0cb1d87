"""Finding and replacing the nodes of any Flax NNX model.

A path is the `"/"`-joined NNX path of a layer, the same in rules, logs, errors, rank
files and checkpoints. No two nodes have the same: where a key with a `"/"` makes one
that another node has, the model is refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar, cast

from flax import nnx

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankLayer, LowRankParam, low_rank_type
from lowrank_jax.nnx_internals import attributes
from lowrank_jax.ranks import name_of

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model: what surgery returns has the attributes and methods it is given."""

_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)
_ADDED = re.compile("(.*_)?(bias|scale|pos|positions?|positional)(_.*)?")


def find_layers(model: nnx.Module) -> dict[str, tuple[nnx.Module, list[str]]]:
    """Finds all layers that have, or can have, a low-rank form.

    Returns:
      For each layer, under its first path in sorted order, the layer and all its paths
      (a module that is shared has several).
    """
    found: dict[int, tuple[nnx.Module, list[str]]] = {}
    for path, node in walk(model):
        if isinstance(node, LowRankLayer) or low_rank_type(type(node)):
            found.setdefault(id(node), (node, []))[1].append(path)
    return {paths[0]: (layer, paths) for layer, paths in found.values()}


def find_own_matrices(model: nnx.Module) -> dict[str, tuple[nnx.Param, list[str]]]:
    """Finds the matrices that modules hold themselves, outside of layers we know.

    Params with two axes longer than 1 count as matrices, unless they are factors,
    belong to a norm, or their name says that they scale or are added (`scale`, `bias`,
    `position...`).

    Returns:
      For each Param, under its first path in sorted order, the Param and all its paths.
    """
    of_layers = {
        id(value)
        for layer, _ in find_layers(model).values()
        for value in attributes(layer).values()
    }
    found: dict[int, tuple[nnx.Param, list[str]]] = {}
    for parts, node, parent in _visit(model):
        if (
            isinstance(node, nnx.Param)
            and sum(size > 1 for size in shape_of(node)) >= 2
            and id(node) not in of_layers
            and not isinstance(parent, (Factors, *_NORMS))
            and not _ADDED.fullmatch(parts[-1])
        ):
            found.setdefault(id(node), (node, []))[1].append("/".join(parts))
    return {paths[0]: (param, paths) for param, paths in found.values()}


def param_sizes(model: nnx.Module) -> dict[int, int]:
    """Counts the numbers in each Param of a model, by its `id`."""
    return {
        id(node): math.prod(shape_of(node))
        for _, node in walk(model)
        if isinstance(node, nnx.Param)
    }


def factors_of_layers(layers: Mapping[str, tuple[nnx.Module, list[str]]]) -> set[int]:
    """Returns the `id` of all factors that are a layer's kernel, not a Param alone."""
    return {
        id(layer.factors)
        for layer, _ in layers.values()
        if isinstance(layer, LowRankLayer) and not isinstance(layer, LowRankParam)
    }


def shape_of(param: nnx.Param) -> tuple[int, ...]:
    """Returns the shape of what a Param holds, () where that is no array."""
    return getattr(param.get_value(), "shape", ())  # a Param may hold anything


def find_factors(model: nnx.Module) -> dict[str, Factors]:
    """Finds all `Factors` of a model by the path of their layer, each once.

    Factors that several layers share stand under their first path, those that belong to
    no layer under their own.
    """
    found: dict[int, tuple[str, Factors]] = {}
    for path, factors in _walk_factors(model):
        found.setdefault(id(factors), (path, factors))
    return dict(found.values())


def find_aliases(model: nnx.Module) -> dict[str, str]:
    """Finds the further paths of shared factors: `{path: path in find_factors}`."""
    first: dict[int, str] = {}
    aliases = {}
    for path, factors in _walk_factors(model):
        if first.setdefault(id(factors), path) != path:
            aliases[path] = first[id(factors)]
    return aliases


class RankArray(NamedTuple):
    """An array of which a prefix is a lower rank.

    Args:
      layer: Path of its factors in `find_factors`.
      axes: Its rank axes, counted from the end.
      variable: What holds it.
    """

    layer: str
    axes: tuple[int, ...]
    variable: nnx.Variable


def find_rank_arrays(model: nnx.Module) -> dict[str, RankArray]:
    """Finds the arrays that a cut makes smaller, each once, by `LAYER/NAME`."""
    return {
        f"{path}/{name}".removeprefix("/"): RankArray(
            path, axes, getattr(factors, name)
        )
        for path, factors in find_factors(model).items()
        for name, axes in factors.rank_axes.items()
        if getattr(factors, name) is not None
    }


def _walk_factors(model: nnx.Module) -> Iterator[tuple[str, Factors]]:
    """Every reference to factors, by the path of the module that has them as its
    attribute `factors`, else by their own."""
    for parts, node, parent in _visit(model):
        if isinstance(node, Factors):
            of_layer = isinstance(parent, nnx.Module) and parts[-1] == "factors"
            yield "/".join(parts[:-1] if of_layer else parts), node


def walk(root: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Yields every reference to a node in sorted order, a shared one at each of its
    paths.

    Raises:
      UserError: Two nodes have one path.
    """
    for parts, node, _ in _visit(root):
        yield "/".join(parts), node


def _visit(root: nnx.Module) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """As `walk`, the path in parts, and the node that holds the node."""
    seen: set[str] = set()

    def visit(
        node: Any, parts: tuple[str, ...], parents: tuple[Any, ...]
    ) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
        if any(node is parent for parent in parents):  # a cycle in the graph
            return
        path = "/".join(parts)
        if path in seen:
            raise UserError(
                f"{name_of(path)}: every part of a model must have a path of its own,"
                " got two with this one, from a key with '/'. Rename one."
            )
        seen.add(path)
        yield parts, node, parents[-1] if parents else None
        for key, child in _children(node):
            yield from visit(child, (*parts, str(key)), (*parents, node))

    yield from visit(root, (), ())


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Mapping):  # keys may be of several types
        return sorted(node.items(), key=lambda item: str(item[0]))
    if isinstance(node, list | tuple | nnx.List):
        return enumerate(node)
    if isinstance(node, nnx.Module):
        return sorted(attributes(node).items())
    return ()


def replace(root: Model, replacement: Callable[[Any], nnx.Module | None]) -> Model:
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
            if isinstance(node, MutableMapping | list | nnx.List):
                node[key] = new
            else:
                setattr(node, key, nnx.data(new))
        return node

    return cast(Model, visit(root))
