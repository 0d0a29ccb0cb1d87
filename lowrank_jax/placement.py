"""Where arrays are: what keeps them there, and what brings them to the host.

The library knows no meshes. What it makes of arrays that are split over one (a
`NamedSharding`) it splits alike, as far as sizes divide; arrays with any other
sharding, on one device say, are left where JAX puts them. Under a trace nothing is
done: there XLA decides, or the mesh's explicit axis types do.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float


def sharding_of(array: Any) -> Sharding | None:
    """Returns the sharding of an array, a variable's or a `jax.ShapeDtypeStruct`.

    None for a traced array, one of NumPy, and a struct that says nothing of it.
    """
    if isinstance(array, nnx.Variable):
        array = array.get_value()
    if isinstance(array, jax.core.Tracer):
        return None
    return getattr(array, "sharding", None)


def respec(sharding: Sharding | None, shape: tuple[int, ...]) -> Sharding | None:
    """Returns a sharding for an array of another shape.

    Axis by axis from the first one: split over the same mesh axes where the size
    divides, else not. A sharding that is no `NamedSharding` is returned as it is.

    >>> columns = NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec(None, "x"))
    >>> respec(columns, (3,)).spec == PartitionSpec(None)
    True
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [
        axes if size % _parts(sharding, axes) == 0 else None
        for axes, size in zip(sharding.spec, shape, strict=False)
    ]
    return _with_spec(sharding, *spec)


def kept(array: Array, sharding: Sharding | None) -> Array:
    """Returns an array put where another one with this sharding is, by `respec`.

    A traced array comes back as it is, and so does any for a sharding that is no
    `NamedSharding` or has no devices (of an abstract mesh). Every process must call it.
    """
    if not isinstance(sharding, NamedSharding) or isinstance(array, jax.core.Tracer):
        return array
    wanted = respec(sharding, array.shape)
    if sharding_of(array) == wanted or not isinstance(sharding.mesh, Mesh):
        return array
    with jax.ensure_compile_time_eval():  # what is known stays known under a trace
        return jax.device_put(array, wanted)


def move(variable: nnx.Variable, sharding: Sharding | None) -> None:
    """Puts a variable's array where another one with this sharding is, in place."""
    variable.set_value(kept(variable.get_value(), sharding))


def replace(variable: nnx.Variable, array: Array) -> None:
    """Sets a variable to another array, put where the one before it is."""
    variable.set_value(kept(array, sharding_of(variable)))


def replicated(sharding: Sharding | None) -> Sharding | None:
    """Returns the sharding of what is whole on every device of a `NamedSharding`."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return _with_spec(sharding)


def with_axes(sharding: Sharding | None, *axes: int | None) -> Sharding | None:
    """Returns a sharding whose axes are split as these of the given one.

    Args:
      sharding: What to take from.
      *axes: For each axis one of the given sharding's; None for an axis that is whole.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec: dict[int | None, Any] = dict(enumerate(sharding.spec))
    return _with_spec(sharding, *(spec.get(axis) for axis in axes))


def of_product(left: Any, right: Any) -> Sharding | None:
    """Returns the sharding of a stack of products of two factors, which lie somewhere.

    Rows are split as the left factors', columns as the right ones', but over no axis of
    a mesh that the rows or the stack are split over.
    """
    both = map(sharding_of, (left, right))
    shardings = [x for x in both if isinstance(x, NamedSharding)]
    if len(shardings) < 2:
        return None
    lead, columns = (
        [*sharding.spec, *[None] * (left.ndim - len(sharding.spec))]
        for sharding in shardings
    )
    taken = {name for axes in lead[:-1] for name in _names(axes)}
    column = None if taken & set(_names(columns[-1])) else columns[-1]
    return _with_spec(shardings[0], *lead[:-1], column)


def beside(tree: Any, others: Any) -> Any:
    """Returns a tree whose arrays are on the mesh that others are on.

    Arrays of the tree that have no `NamedSharding` become whole on every device of the
    first one among the others; without one there the tree comes back as it is.
    """
    shardings = map(sharding_of, jax.tree.leaves(others))
    meshes = (x for x in shardings if isinstance(x, NamedSharding))
    target = replicated(next(meshes, None))

    def moved(array: Any) -> Any:
        if isinstance(sharding_of(array), NamedSharding):
            return array
        return kept(array, target)

    return tree if target is None else jax.tree.map(moved, tree)


def to_host(array: Any) -> np.ndarray:
    """Brings an array to the host, also one whose parts other processes hold.

    Every process must call it, and gets the same.
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def all_finite(array: Array) -> bool:
    """Returns whether there is no NaN or infinity.

    An array on a mesh is not brought to the host; any other is, since NumPy compiles
    nothing.
    """
    if not isinstance(sharding_of(array), NamedSharding):
        return bool(np.isfinite(array).all())
    with jax.ensure_compile_time_eval():  # what is known stays known under a trace
        return bool(jnp.isfinite(array).all())


def whole(matrix: Float[Array, "*stack i o"]) -> Float[Array, "*stack i o"]:
    """Returns matrices that are not split over a mesh of explicit axes.

    Decompositions ask for it there, of stacks on CPU in every axis, also under a trace;
    elsewhere XLA gathers what it must.
    """
    if not is_explicit(matrix):
        return matrix
    return jax.sharding.reshard(matrix, _with_spec(jax.typeof(matrix).sharding))


def reshape(array: Array, *shape: int) -> Array:
    """Returns an array in another shape, on a mesh of explicit axes too.

    Where axes merge, or one is split up, the first of the new ones is split over the
    mesh as the first of the old ones was, and the others are whole; so XLA does it too.
    """
    if not is_explicit(array):
        return array.reshape(shape)
    sharding = jax.typeof(array).sharding
    spec = _reshaped_spec(sharding, array.shape, shape)
    return jax.lax.reshape(array, shape, out_sharding=_with_spec(sharding, *spec))


def masked(mask: Bool[Array, "..."], array: Array) -> Array:
    """Returns an array with zeros where a mask, which broadcasts to it, is false."""
    if is_explicit(array):  # there, axes that both have must be split alike
        sharding = jax.typeof(array).sharding
        spec = sharding.spec[array.ndim - mask.ndim :]
        axes = (x if n > 1 else None for x, n in zip(spec, mask.shape, strict=True))
        mask = jax.sharding.reshard(mask, _with_spec(sharding, *axes))
    return jnp.where(mask, array, 0)


def factor_beside(
    right: Float[Array, "*stack r o"], left: Float[Array, "*stack i r"]
) -> Float[Array, "*stack r o"]:
    """Returns a right factor that can be multiplied by a left one on explicit axes.

    Two axes of the product cannot be split over the same axis of a mesh: there, the
    columns become whole. XLA settles it by itself on other meshes.
    """
    if not (is_explicit(right) and is_explicit(left)):
        return right
    sharding = jax.typeof(right).sharding
    rows, columns = jax.typeof(left).sharding.spec[-2], sharding.spec[-1]
    if not set(_names(rows)) & set(_names(columns)):
        return right
    return jax.sharding.reshard(right, _with_spec(sharding, *sharding.spec[:-1]))


def is_explicit(array: Array) -> bool:
    """Whether how an array is split is part of its type (`AxisType.Explicit`)."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def _parts(sharding: NamedSharding, axes: Any) -> int:
    """Over how many devices an entry of a spec splits an axis."""
    return math.prod(sharding.mesh.shape[name] for name in _names(axes))


def _names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _reshaped_spec(
    sharding: NamedSharding, old: tuple[int, ...], new: tuple[int, ...]
) -> list[Any]:
    """The spec of `reshape`, found over runs of axes of equal sizes, old and new."""
    spec: list[Any] = [None] * len(new)
    first = {"old": 0, "new": 0}
    sizes = {"old": old, "new": new}
    while 0 not in old and all(first[side] < len(sizes[side]) for side in sizes):
        past = {side: first[side] + 1 for side in sizes}
        run = {side: sizes[side][first[side]] for side in sizes}
        while run["old"] != run["new"]:
            side = min(run, key=run.__getitem__)
            run[side] *= sizes[side][past[side]]
            past[side] += 1
        leading = {
            side: [n for n in range(first[side], past[side]) if sizes[side][n] > 1][:1]
            for side in sizes
        }
        for source, target in zip(leading["old"], leading["new"], strict=True):
            if new[target] % _parts(sharding, sharding.spec[source]) == 0:
                spec[target] = sharding.spec[source]
        first = past
    return spec


def _with_spec(sharding: NamedSharding, *spec: Any) -> NamedSharding:
    return NamedSharding(
        sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind
    )
