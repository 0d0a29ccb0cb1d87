"""What a checkpoint holds: arrays by item and path, and the metadata that tell of them.

An item is a tree of arrays with a name; each array has its `"/"`-joined path in it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lowrank_jax import placement
from lowrank_jax.active import get_ranks, max_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import rules_of
from lowrank_jax.factors import Factors
from lowrank_jax.nnx_internals import split
from lowrank_jax.paths import find_factors, walk
from lowrank_jax.pieces import seal
from lowrank_jax.ranked import Rank
from lowrank_jax.ranks import Ranks, largest
from lowrank_jax.version import __version__

FORMAT_VERSION = 3
MODEL_ITEMS = ("params", "model_state")
"""The items that `model_items` makes, whose paths are the model's own."""


def model_items(model: nnx.Module) -> dict[str, Any]:
    """Returns a model's arrays as two trees: parameters, and the rest.

    Ranks and random keys are left out.
    """
    _, params, _, state = split(model, nnx.Param, (Rank, nnx.RngState), ...)
    trees = nnx.as_pure(params), nnx.as_pure(state)
    return dict(zip(MODEL_ITEMS, trees, strict=True))


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by `"/"`-joined path.

    Raises:
      UserError: Two leaves have one path, such as "x/y" next to "x" that holds "y".
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    flat: dict[str, Any] = {}
    colliding = []
    for path, leaf in leaves:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        colliding += [key] if key in flat else []
        flat[key] = leaf
    if colliding:
        raise UserError(
            f"paths: must be one array's each, got several for {colliding}. Rename the"
            ' modules or dictionary keys that have a "/" in their name.'
        )
    return flat


def contents(
    step: int,
    model: nnx.Module,
    metadata: Mapping[str, Any],
    items: Mapping[str, Any] | None,
    figure: float | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns what a checkpoint holds: arrays by item and path, and sealed metadata.

    Raises:
      TypeError: The metadata hold something other than JSON values.
      UserError: Two arrays have one path.
    """
    trees = {**model_items(model), **(items or {})}
    flat = {name: flatten(tree) for name, tree in trees.items()}
    if figure is not None:
        figure = float(figure) if math.isfinite(figure) else None
    about = {
        **metadata,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "step": step,
        "figure": figure,
        "ranks": get_ranks(model),
        "max_ranks": max_ranks(model),
        "rank_rules": rules_of(model),
        "rank_axes": {key: axes for key, (_, axes) in _factor_arrays(model).items()},
        "arrays": {name: _describe(leaves) for name, leaves in flat.items()},
    }
    return flat, seal(json.loads(json.dumps(about)))  # a copy: it is written later


def read_axes(
    flat: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Returns the axes along which arrays are read in part, by item and path."""
    return {
        name: {
            key: axes[0] for key in leaves if (axes := _axes_of(name, key, metadata))
        }
        for name, leaves in flat.items()
    }


def at_ranks(model: nnx.Module, params: Any, ranks: Ranks) -> Any:
    """Returns templates of the parameters with the factors of each layer allocated at
    these ranks, under the shardings of what is given."""
    arrays = _factor_arrays(model)
    paths = {id(factors): path for path, factors in find_factors(model).items()}

    def template(key_path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sizes = list(leaf.shape)
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if key in arrays:
            factors, axes = arrays[key]
            for axis in axes:
                sizes[axis] = largest(ranks[paths[id(factors)]])
        shape = tuple(sizes)
        sharding = placement.respec(placement.sharding_of(leaf), shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(template, params)


def differences(
    name: str, leaves: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[str]:
    """Says how a template departs from the stored arrays, other than by lower ranks."""
    stored = metadata["arrays"].get(name)
    if stored is None:
        known = sorted(metadata["arrays"])
        return [f"{name}: is not in the checkpoint, which has {known}"]
    problems = [
        f"{name}/{key}: is not in the checkpoint" for key in leaves - stored.keys()
    ]
    problems += [f"{name}/{key}: is not in the model" for key in stored.keys() - leaves]
    for key in leaves.keys() & stored.keys():
        (shape, dtype), leaf = stored[key], leaves[key]
        wanted = list(leaf.shape)
        fits = len(shape) == len(wanted)
        for axis in _axes_of(name, key, metadata) if fits else ():
            wanted[axis] = max(wanted[axis], shape[axis])
        if not fits or wanted != shape or str(leaf.dtype) != dtype:
            problems.append(
                f"{name}/{key}: is {dtype}{shape} in the checkpoint,"
                f" {leaf.dtype}{list(leaf.shape)} in the model"
            )
    return sorted(problems)


def _factor_arrays(
    model: nnx.Module,
) -> dict[str, tuple[Factors, tuple[int, ...]]]:
    """The arrays that are cut with a rank, at all their paths: whose, and their rank
    axes."""
    return {
        f"{path}/{name}".removeprefix("/"): (node, axes)
        for path, node in walk(model)
        if isinstance(node, Factors)
        for name, axes in node.rank_axes.items()
        if getattr(node, name) is not None
    }


def _axes_of(item: str, key: str, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The rank axes of an array: a parameter's by its path, a moment's by those of the
    parameter that its path ends in, the longest there is."""
    axes, params = metadata["rank_axes"], metadata["arrays"]["params"]
    parts = key.split("/")
    starts = range(1 if item in MODEL_ITEMS else len(parts))
    ends = ("/".join(parts[start:]) for start in starts)
    param = next((end for end in ends if end in params or end in axes), None)
    return tuple(axes.get(param, ()))


def _describe(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [list(x.shape), str(x.dtype)] for key, x in leaves.items()}
