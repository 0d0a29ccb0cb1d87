"""Meshes of explicit axes (sharding in types): what works there, and what is refused.

With `tensor` an axis of the mesh: kernels split by columns, by rows with the inputs
(where `out_sharding` says what the sum becomes), and over `fsdp`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layer_rows import ORDERS, forced
from meshes import mesh_of, put, quick, spec_of
from reference import relative_error

import lowrank_jax as lr
from lowrank_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, and how it is called on a mesh.

    Args:
      dense: Makes the layer.
      kernel: How its kernel is split.
      shape: Of the input; None for words.
      inputs: How the input is split.
      outputs: What is asked of the output, as `out_sharding`; None asks for nothing.
      call: Name of the method.
    """

    dense: Callable[[], nnx.Module]
    kernel: tuple[Any, ...]
    shape: tuple[int, ...] | None
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...] | None
    call: str = "__call__"


def linear(*args: Any, **options: Any) -> Callable[[], nnx.Module]:
    options = {"use_bias": False, **options}
    return lambda: nnx.LinearGeneral(*args, **options, rngs=nnx.Rngs(0))


def einsum(*args: Any) -> Callable[[], nnx.Module]:
    return lambda: nnx.Einsum(*args, rngs=nnx.Rngs(0))


def conv(**options: Any) -> Callable[[], nnx.Module]:
    return lambda: nnx.Conv(4, 8, (3,), use_bias=False, rngs=nnx.Rngs(0), **options)


def embed() -> nnx.Module:
    return nnx.Embed(16, 8, rngs=nnx.Rngs(0))


COLUMNS, ROWS_ = (None, "tensor"), ("tensor", None)
FEATURES = ("data", None, "tensor")
ROWS = {
    "columns": Row(
        lambda: nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0)),
        COLUMNS,
        (4, 16),
        ("data",),
        None,
    ),
    "rows": Row(
        lambda: nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0)),
        ROWS_,
        (4, 6, 16),
        FEATURES,
        ("data", None, None),
    ),
    "rows, sum split over tokens": Row(
        linear(16, 8), ROWS_, (4, 6, 16), FEATURES, ("data", "tensor", None)
    ),
    "fsdp": Row(
        linear(16, 8), ("fsdp", "tensor"), (4, 16), ("data",), ("data", "tensor")
    ),
    "heads": Row(
        linear(8, (4, 2)), (*COLUMNS, None), (4, 6, 8), ("data",), (*FEATURES, None)
    ),
    "heads in": Row(
        linear((4, 2), 8, axis=(-2, -1)),
        (*ROWS_, None),
        (4, 6, 4, 2),
        FEATURES,
        ("data", None, None),
    ),
    "stack": Row(
        linear(8, 4, batch_axis={0: 4}), ("tensor",), (4, 6, 8), ("tensor",), None
    ),
    "einsum": Row(
        einsum("...i,ihd->...hd", (8, 4, 2)),
        (*COLUMNS, None),
        (4, 6, 8),
        ("data",),
        (*FEATURES, None),
    ),
    "einsum in": Row(
        einsum("...hd,hdi->...i", (4, 2, 8)),
        (*ROWS_, None),
        (4, 6, 4, 2),
        FEATURES,
        ("data", None, None),
    ),
    "lookup": Row(embed, COLUMNS, None, ("data",), FEATURES),
    "lookup in a split table": Row(embed, ROWS_, None, ("data",), ("data", None, None)),
    "attend": Row(embed, COLUMNS, (4, 6, 8), FEATURES, ("data", None, None), "attend"),
    "convolution": Row(conv(), (None, *COLUMNS), (4, 6, 4), ("data",), FEATURES),
    "convolution, channels": Row(
        conv(), (None, *ROWS_), (4, 6, 4), FEATURES, ("data", None, None)
    ),
}
QUICK = ("rows", "heads", "convolution, channels")


def kernel_of(model: nnx.Module) -> nnx.Param:
    return model.embedding if hasattr(model, "embedding") else model.kernel


def inputs_of(row: Row) -> jax.Array:
    random = np.random.default_rng(0)
    if row.shape is None:
        return jnp.asarray(random.integers(0, 16, (4, 6)), jnp.int32)
    return jnp.asarray(random.normal(size=row.shape), jnp.float32)


def outputs_and_gradients(model: nnx.Module, row: Row, inputs, outputs) -> list[Any]:
    """For each order, in one program."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, inputs: jax.Array, order: str) -> tuple[jax.Array, jax.Array]:
        layer = nnx.merge(graph, params, rest, copy=True)
        with forced(order):
            result = getattr(layer, row.call)(inputs, **outputs)
        return jnp.sum(jnp.sin(result)), result

    @jax.jit
    def both(params: Any, inputs: jax.Array) -> list[Any]:
        grad = jax.grad(loss, has_aux=True)
        return [grad(params, inputs, order) for order in ORDERS]

    return both(params, inputs)


@pytest.mark.parametrize("name", quick(ROWS, QUICK))
def test_a_layer_lives_on_a_mesh_of_explicit_axes(name: str):
    """Factorize, cut, run and differentiate in both orders, canonicalize, merge: all as
    on one device, and split as the kernel is."""
    row, mesh = ROWS[name], mesh_of(kind=AxisType.Explicit)
    dense, inputs = row.dense(), inputs_of(row)
    expected = lr.truncate(lr.factorize(dense), {"": 3} if name != "stack" else {})
    with jax.set_mesh(mesh):
        kernel = kernel_of(dense)
        split = nnx.clone(dense)
        kernel_of(split).set_value(put(kernel.get_value(), mesh, *row.kernel))
        model = lr.truncate(lr.factorize(split), {"": 3} if name != "stack" else {})
        asked = {} if row.outputs is None else {"out_sharding": P(*row.outputs)}
        placed = put(inputs, mesh, *row.inputs)
        found = outputs_and_gradients(model, row, placed, asked)
        if row.outputs is not None:
            assert all(spec_of(order[1]) == row.outputs for order in found)
        merged = lr.merge(model)
        if name != "convolution, channels":  # its rows `k c` are whole
            whole = (None,) * (kernel.ndim - len(row.kernel))
            assert spec_of(kernel_of(merged)) == (*row.kernel, *whole)
        canonical = lr.canonicalize(model)
        ranks = lr.tail_ranks(model, threshold=1e-3)
    assert [spec_of(x) for x in canonical.factors.params().values()] == [
        spec_of(x) for x in model.factors.params().values()
    ]
    assert ranks == lr.tail_ranks(expected, threshold=1e-3)
    wanted = outputs_and_gradients(expected, row, inputs, {})
    pairs = [
        (found, wanted),
        (kernel_of(merged), kernel_of(lr.merge(expected))),
        (kernel_of(canonical)[...], kernel_of(expected)[...]),
    ]
    for one, other in pairs:
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            assert relative_error(np.asarray(a), np.asarray(b)) <= 1e-5


def explicit(layers: dict[str, nnx.Module]) -> nnx.Module:
    model, mesh = nnx.Dict(layers), mesh_of(kind=AxisType.Explicit)
    for layer in layers.values():
        layer.kernel.set_value(put(layer.kernel[...], mesh, None, None, "tensor"))
    return model


def test_grouped_convolutions_are_refused_by_path():
    """Their gradient is wrong there, of dense ones too; one error for all of them."""
    layers = {"one": conv(feature_group_count=2)(), "two": conv()()}
    model = explicit({**layers, "three": conv(feature_group_count=4)()})
    with pytest.raises(UserError) as error:
        lr.factorize(model)
    first, second = str(error.value).split("\n")
    assert first.startswith("one: a convolution with feature groups must")
    assert second.startswith("three: a convolution") and "got axes (2, 2, 2)" in second
    assert lr.find_factors(lr.factorize(model, [("two", "full"), (".*", "dense")]))


def test_the_gauge_form_is_refused_by_path():
    model = lr.factorize(explicit({"one": conv()(), "two": conv()()}))
    with pytest.raises(UserError) as error:
        lr.truncate(model, {"one": 2}, form="gauge")
    assert [line.split(": ")[0] for line in str(error.value).split("\n")] == [
        "one",
        "two",
    ]
    assert "AxisType.Auto" in str(error.value)
