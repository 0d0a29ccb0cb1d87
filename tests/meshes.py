"""Meshes of the 8 simulated devices, and models that are split over them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_jax.paths import find_factors

AXES = ("data", "fsdp", "tensor")


def quick(rows: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """Names of rows as parameters of a test: slow but for the chosen ones, since every
    row compiles programs of its own for 8 devices."""
    return [
        pytest.param(name, marks=[] if name in chosen else pytest.mark.slow)
        for name in rows
    ]


def mesh_of(sizes: tuple[int, ...] = (2, 2, 2), kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=(kind,) * len(AXES))


def put(array: Any, mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def fitting(shape: tuple[int, ...], mesh: Mesh, spec: Mapping[int, str]) -> list[Any]:
    """A spec with these axes where the sizes divide."""
    axes: list[Any] = [None] * len(shape)
    for axis, name in spec.items():
        if shape[axis] % mesh.shape[name] == 0:
            axes[axis] = name
    return axes


def spread(
    model: nnx.Module,
    mesh: Mesh,
    *,
    u: str | None = "fsdp",
    v: str | None = "tensor",
) -> nnx.Module:
    """A copy on the mesh: rows of `u` and columns of `v` over these axes, where they
    divide; everything else whole on every device."""
    model = nnx.clone(model)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and not _is_key(variable):
            variable.set_value(put(variable.get_value(), mesh))
    for factors in find_factors(model).values():
        for name, (axis, over) in {"u": (-2, u), "v": (-1, v)}.items():
            variable = getattr(factors, name)
            spec = fitting(variable.shape, mesh, {axis: over} if over else {})
            variable.set_value(put(variable.get_value(), mesh, *spec))
    return model


def spec_of(array: Any) -> tuple[Any, ...]:
    """How an array is split, an entry for each axis; it must be on a mesh."""
    assert isinstance(array.sharding, NamedSharding), array.sharding
    spec = array.sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def specs_of(tree: Any) -> dict[str, tuple[Any, ...]]:
    """How each array of a tree, or of a model's parameters, is split."""
    if isinstance(tree, nnx.Module):
        tree = nnx.as_pure(nnx.state(tree, nnx.Param))
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): spec_of(leaf) for path, leaf in leaves}


def _is_key(variable: nnx.Variable) -> bool:
    return jnp.issubdtype(variable.get_value().dtype, jax.dtypes.prng_key)
