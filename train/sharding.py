"""Where arrays lie on many devices: a mesh, and one table from axes to its axes.

The library knows nothing of it. A mesh has three axes:

- `data`: every device has all parameters and its share of the batch; gradients are
  summed over it (one all-reduce of each gradient a step);
- `fsdp`: as `data`, but each device keeps a share of parameters, gradients and
  optimizer state; a parameter is gathered where it is used, its gradient is reduced to
  the share;
- `tensor`: every device has a share of each layer's features. Factors make this cheap:
  with `u` split along its inputs and `v` along its outputs, activations stay split from
  layer to layer, and what is summed over devices is the hidden `x u`, rows x rank,
  once forward and once backward; a pair of dense layers sums rows x width as often.

Communication by formula, and what the compiled step has: docs/scaling.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.checkpoint import flatten
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Rank
from lowrank_jax.paths import find_factors, walk
from lowrank_jax.ranks import name_of

SCHEMA = {"data": int, "fsdp": int, "tensor": int}
"""The mesh of a config: devices along each axis; -1 for what is left, once."""

MESH_AXES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "in": ("fsdp", "tensor"),
    "out": ("fsdp", "tensor"),
    "rank": (),
    "kernel_in": ("fsdp",),
    "kernel_out": ("tensor",),
    "features": ("tensor",),
    None: (),
}
"""Which axes of the mesh each logical axis of an array is split over.

Factors have `in`, `rank`, `out`: the rank stays whole, since it is what shrinks. What
is not factored has `kernel_in` (its largest axis but the last) and `kernel_out` (the
last), vectors have `features`. An axis that does not divide stays whole."""

FACTOR_AXES = {"u": ("in", "rank"), "s": ("rank",), "v": ("rank", "out")}
"""The last logical axes of the arrays of factors; what is not here stays whole."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts arrays on a mesh.

    Args:
      mesh: With axes `data`, `fsdp` and `tensor`.
    """

    mesh: Mesh

    @property
    def splits_params(self) -> bool:
        """Whether parameters are split, so that no device has all of them."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in MESH_AXES["batch"])

    def check(self, model: nnx.Module) -> None:
        """Refuses what XLA computes wrongly on this mesh.

        The gradient of a grouped convolution's kernel comes out too large by the size
        of the axes that do not split the batch; that of one whose input is dilated, as
        a transposed one's is, is wrong where its factors are split (jax 0.10.2;
        tests/lowrank_jax/test_sharded.py says when they are mended).

        Raises:
          UserError: Naming the layers.
        """
        if self.mesh.size == self.batch_shards:
            return
        wrong = [name_of(path) for path, node in walk(model) if _errs_split(node)]
        if wrong:
            raise UserError(
                "config.mesh: tensor must be 1 beside convolutions with groups or a"
                " dilated input (transposed ones), whose gradients XLA gets wrong"
                f" otherwise, got {self.mesh.shape['tensor']} and {wrong}. Use data and"
                " fsdp."
            )

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a run has one; asked for every batch)
    def rows(self, size: int) -> np.ndarray:
        """Returns which rows of a global batch this process has, in order.

        Those of its devices, which on a slice of TPUs need not lie beside each other.
        """
        places = self._of_batch(size).addressable_devices_indices_map((size,)).values()
        return np.unique([np.arange(size)[place] for (place,) in places])

    def batch(self, rows: Mapping[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        """Makes a global batch, split over devices, of this process's rows.

        One whose size does not divide lies whole on every device.

        Args:
          rows: Arrays of the rows that `rows` names.
          size: Rows of the global batch.
        """
        sharding, own = self._of_batch(size), self.rows(size)

        def array(part: np.ndarray) -> jax.Array:
            def of_device(place: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = place[0].indices(size)
                first = np.searchsorted(own, start)
                return part[first : first + stop - start]

            shape = (size, *part.shape[1:])
            return jax.make_array_from_callback(shape, sharding, of_device)

        return {name: array(part) for name, part in rows.items()}

    def _of_batch(self, size: int) -> NamedSharding:
        axes = () if size % self.batch_shards else MESH_AXES["batch"]
        return self.sharding(PartitionSpec(axes or None))

    def parts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Splits the rows of (parts, rows, ...) arrays over devices, in a trace."""
        sharding = self.sharding(PartitionSpec(None, MESH_AXES["batch"]))
        constrain = jax.lax.with_sharding_constraint
        return {name: constrain(array, sharding) for name, array in batch.items()}

    def whole(self, tree: Any) -> Any:
        """Puts arrays that every process has whole on every device."""
        sharding = self.sharding(PartitionSpec())
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)

    def build(self, build: Callable[[], nnx.Module]) -> nnx.Module:
        """Returns a new model on the mesh, made there where its parameters are split.

        Args:
          build: Makes the model; traced where parameters are split.
        """
        if not self.splits_params:
            return self.put_model(build())
        abstract = nnx.eval_shape(build)
        layout, kinds = self.layout(abstract), (nnx.Param, (Rank, nnx.RngState), ...)

        def parts() -> tuple[Any, ...]:
            return tuple(nnx.as_pure(part) for part in nnx.split(build(), *kinds)[1:])

        graphdef, params, *others = nnx.split(abstract, *kinds)
        whole = self.sharding(PartitionSpec())
        shardings = (layout.shardings(nnx.as_pure(params)), whole, whole)
        params, local, rest = jax.jit(parts, out_shardings=shardings)()
        local = jax.tree.map(_uncommitted, local)
        return nnx.merge(graphdef, params, local, rest)

    def put_model(self, model: nnx.Module) -> nnx.Module:
        """Returns the model with its arrays on the mesh; ranks and random keys stay
        with the program, which is the same everywhere."""
        kinds = (nnx.Param, (Rank, nnx.RngState), ...)
        graphdef, params, local, rest = nnx.split(model, *kinds)
        params = self.layout(model).put(nnx.as_pure(params))
        return nnx.merge(graphdef, params, local, self.whole(nnx.as_pure(rest)))

    def template(self, model: nnx.Module) -> nnx.Module:
        """Returns an abstract model whose arrays say where they shall lie."""
        kinds = (nnx.Param, (Rank, nnx.RngState), ...)
        graphdef, params, local, rest = nnx.split(model, *kinds)
        params, rest = nnx.as_pure(params), nnx.as_pure(rest)
        whole = self.sharding(PartitionSpec())
        params = jax.tree.map(_struct, params, self.layout(model).shardings(params))
        rest = jax.tree.map(lambda leaf: _struct(leaf, whole), rest)
        return nnx.merge(graphdef, params, local, rest)

    def layout(self, model: nnx.Module) -> "Layout":
        """Returns how the parameters of a model, and what belongs to them, lie."""
        logical = logical_axes(model)
        params = flatten(nnx.as_pure(nnx.state(model, nnx.Param)))
        specs = {
            key: self.fitting([MESH_AXES.get(name, ()) for name in logical[key]], leaf)
            for key, leaf in params.items()
        }
        return Layout(self, specs)

    def fitting(self, spec: Iterable[Any], leaf: Any) -> PartitionSpec:
        """Returns a spec without the axes that do not divide an array's."""
        spec, kept = tuple(spec), []
        if len(spec) > len(leaf.shape):
            return PartitionSpec()
        for axes, size in zip(spec, leaf.shape, strict=False):
            parts, dividing = 1, []
            for axis in _names(axes):
                more = self.mesh.shape[axis]
                if more > 1 and size and not size % (parts * more):
                    parts, dividing = parts * more, [*dividing, axis]
            kept.append(tuple(dividing) or None)
        return PartitionSpec(*kept)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Returns a sharding over the mesh."""
        return NamedSharding(self.mesh, spec)


class Layout(NamedTuple):
    """A placement that knows a model's parameters.

    Args:
      placement: Where arrays are put.
      specs: How each parameter is split, by its path.
    """

    placement: Placement
    specs: Mapping[str, PartitionSpec]

    def shardings(self, tree: Any) -> Any:
        """Returns a sharding for each leaf of a tree.

        A leaf whose path ends in that of a parameter, and that has as many axes, is
        split as that one (moments, what a penalty remembers); others are whole.
        """

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            spec = next((self.specs[end] for end in ends if end in self.specs), ())
            placement = self.placement
            return placement.sharding(placement.fitting(spec, leaf))

        return jax.tree.map_with_path(sharding, tree)

    def put(self, tree: Any) -> Any:
        """Puts a tree on the mesh, each leaf as `shardings` says."""
        return jax.tree.map(_put, tree, self.shardings(tree))

    def constrain(self, tree: Any) -> Any:
        """Splits a tree as `put` does, in a trace."""
        if self.placement.mesh.size == 1:
            return tree
        constrain = jax.lax.with_sharding_constraint
        return jax.tree.map(constrain, tree, self.shardings(tree))

    def gather(self, params: Any) -> Any:
        """Gathers parameters over `fsdp`, in a trace; their gradients are split."""
        if self.placement.mesh.shape["fsdp"] == 1:
            return params

        def gather(array: Any, split: NamedSharding) -> Any:
            spec = [[a for a in _names(axes) if a != "fsdp"] for axes in split.spec]
            whole = PartitionSpec(*[tuple(axes) or None for axes in spec])
            return _gather(array, split, self.placement.sharding(whole))

        return jax.tree.map(gather, params, self.shardings(params))


def make_placement(mesh: Mapping[str, int]) -> Placement:
    """Makes the placement of a config's mesh on the devices that there are.

    They are all of JAX's or, where `jax_default_device` names one, this one alone.

    Raises:
      UserError: The axes do not multiply to the number of devices.
    """
    default = jax.config.jax_default_device
    devices = [default] if isinstance(default, jax.Device) else jax.devices()
    sizes = list(mesh.values())
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and not len(devices) % known:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh: must multiply to the {len(devices)} devices there are, with"
            f" -1 for what is left at one axis at the most, got {dict(mesh)}. Change an"
            " axis, or start with other devices."
        )
    names = tuple(SCHEMA)
    sizes = [dict(zip(mesh, sizes, strict=True))[name] for name in names]
    types = (AxisType.Auto,) * len(names)
    return Placement(jax.make_mesh(sizes, names, axis_types=types, devices=devices))


def any_devices(mesh: Mapping[str, int]) -> Placement:
    """Makes the placement of a mesh, or of `data` alone where it does not fit.

    What was trained on more devices than there are is judged on these.
    """
    try:
        return make_placement(mesh)
    except UserError:
        return make_placement({"data": -1, "fsdp": 1, "tensor": 1})


def logical_axes(model: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Returns the names of the axes of each parameter, by its path.

    Names that a `nnx.Param` carries itself (`nnx.Param(x, out_sharding=("in", "out"),
    eager_sharding=False)`) come before those of the table.
    """
    factors = {id(found) for found in find_factors(model).values()}
    names: dict[str, tuple[str | None, ...]] = {}
    for path, node in walk(model):
        for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(value, nnx.Param) and id(node) in factors:
                last = FACTOR_AXES.get(name, ()) if value.ndim else ()
                lead = (None,) * (value.ndim - len(last))
                names[f"{path}/{name}".removeprefix("/")] = (*lead, *last)
    variables = jax.tree.leaves_with_path(
        nnx.state(model, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    for key_path, variable in variables:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if key not in names:
            names[key] = _names_of(variable)
    return names


def _errs_split(node: Any) -> bool:
    """Whether a module is a convolution with groups or a dilated input."""
    dilation = getattr(node, "input_dilation", None) or 1
    return (
        getattr(node, "feature_group_count", 1) != 1
        or hasattr(node, "transpose_kernel")  # a transposed convolution
        or any(np.ravel(dilation) != 1)
    )


def _names_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The axes of a parameter that is not of factors."""
    given = variable.get_metadata().get("out_sharding")
    if given and len(given) == variable.ndim:
        return tuple(given)
    if variable.ndim < 2:
        return ("features",) * variable.ndim
    *others, _ = variable.shape
    largest = max(range(len(others)), key=lambda axis: others[axis])
    names = [None] * len(others)
    names[largest] = "kernel_in"
    return (*names, "kernel_out")


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh in an entry of a spec."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _uncommitted(leaf: jax.Array) -> jax.Array:
    """An array that is whole on every device as one that may be used on any."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        numbers = _uncommitted(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


def _struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array under a sharding that may reach over several processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def _gather(array: Any, split: NamedSharding, gathered: NamedSharding) -> Any:
    """The array under `gathered`; its gradient under `split`."""
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def gather(array: Any) -> Any:
        return constrain(array, gathered)

    gather.defvjp(
        lambda array: (gather(array), None),
        lambda _, gradient: (constrain(gradient, split),),
    )
    return gather(array)
