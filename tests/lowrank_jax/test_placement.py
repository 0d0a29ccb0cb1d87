"""What the library makes of arrays on a mesh is split as they are: 8 devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, put, quick, spec_of, specs_of, spread
from optimizer_rows import ELEMENTWISE, RESTARTED
from reference import relative_error
from two_layers import RANKS, masked_net, pure_params

import lowrank_jax as lr
from lowrank_jax import factorization, placement, selection
from lowrank_jax.optimizer_state import convert_opt_state, restart_schedules
from lowrank_jax.selection import curves


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer with a split kernel, and how what is made of it must be split.

    Args:
      dense: Makes the layer.
      kernel: How its kernel is split.
      u: How `u` must be.
      v: How `v` must be.
      merged: How the kernel must be after the way there and back.
      rule: How to factor it.
    """

    dense: Callable[[], nnx.Module]
    kernel: tuple[Any, ...]
    u: tuple[Any, ...]
    v: tuple[Any, ...]
    merged: tuple[Any, ...]
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)


class Own(nnx.Module):
    """Holds a matrix itself."""

    def __init__(self):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (8, 4)))


def conv(*args: Any, **options: Any) -> Callable[[], nnx.Module]:
    return lambda: nnx.Conv(*args, rngs=nnx.Rngs(0), **options)


def linear(*args: Any, **options: Any) -> Callable[[], nnx.Module]:
    return lambda: nnx.LinearGeneral(*args, rngs=nnx.Rngs(0), **options)


BOTH = ("fsdp", "tensor")
ROW, COLUMN = ("fsdp", None), (None, "tensor")
ROWS = {
    "linear": Row(linear(8, 4), BOTH, ROW, COLUMN, BOTH),
    "linear, s": Row(linear(8, 4), BOTH, ROW, COLUMN, BOTH, {"with_s": True}),
    "linear, deep": Row(linear(8, 4), BOTH, ROW, COLUMN, BOTH, {"depth": 3}),
    "linear, random": Row(linear(8, 4), BOTH, ROW, COLUMN, BOTH, {"init": "random"}),
    "two mesh axes on one": Row(
        linear(8, 4), (BOTH, None), (BOTH, None), (None, None), (BOTH, None)
    ),
    "heads": Row(linear(8, (4, 3)), (*BOTH, None), ROW, COLUMN, (*BOTH, None)),
    "heads whole, their size split": Row(
        linear(8, (3, 4)), ("fsdp", None, "tensor"), ROW, (None, None), (*ROW, None)
    ),
    "heads in": Row(
        linear((4, 2), 8, axis=(-2, -1)),
        ("fsdp", None, "tensor"),
        ROW,
        COLUMN,
        ("fsdp", None, "tensor"),
    ),
    "stack": Row(
        linear(4, 6, batch_axis={0: 2}),
        ("data", "fsdp", "tensor"),
        ("data", "fsdp", None),
        ("data", None, "tensor"),
        ("data", "fsdp", "tensor"),
    ),
    "einsum": Row(
        lambda: nnx.Einsum("bti,hdi->bthd", (4, 2, 8), None, rngs=nnx.Rngs(0)),
        ("tensor", None, "fsdp"),
        ROW,
        COLUMN,
        ("tensor", None, "fsdp"),
    ),
    "embed": Row(lambda: nnx.Embed(8, 8, rngs=nnx.Rngs(0)), BOTH, ROW, COLUMN, BOTH),
    "conv": Row(
        conv(4, 8, (3, 3)),
        (None, None, *BOTH),
        (None, None),
        COLUMN,
        (None, None, None, "tensor"),
    ),
    "conv, 1 x 1": Row(
        conv(4, 6, (1, 1)), (None, None, *BOTH), ROW, COLUMN, (None, None, *BOTH)
    ),
    "conv, groups": Row(
        conv(4, 8, (3,), feature_group_count=2),
        (None, None, "tensor"),
        ("tensor", None, None),
        ("tensor", None, None),
        (None, None, "tensor"),
    ),
    "conv transpose": Row(
        lambda: nnx.ConvTranspose(4, 8, (3,), rngs=nnx.Rngs(0)),
        (None, *BOTH),
        (None, None),
        COLUMN,
        (None, None, "tensor"),
    ),
    "own matrix": Row(Own, BOTH, ROW, COLUMN, BOTH, {"param": True}),
}


QUICK = ("linear, deep", "heads", "conv, groups", "own matrix")


def on_mesh(row: Row) -> tuple[nnx.Module, nnx.Module]:
    """The layer, whole on one device, and its copy with the kernel split."""
    dense = row.dense()
    model = spread(dense, mesh_of())
    kernel = kernel_of(model)
    kernel.set_value(put(kernel.get_value(), mesh_of(), *row.kernel))
    return dense, model


def kernel_of(model: nnx.Module) -> nnx.Param:
    return model.embedding if hasattr(model, "embedding") else model.kernel


def factored(model: nnx.Module, row: Row) -> nnx.Module:
    pattern = "kernel" if row.dense is Own else ".*"
    return lr.factorize(model, [(pattern, row.rule)], rngs=nnx.Rngs(1))


def half(model: nnx.Module) -> dict[str, Any]:
    return lr.ranks_for(model, rank_fraction=0.5)


def assert_equal(model: nnx.Module, other: nnx.Module) -> None:
    """The same numbers, to an SVD's rounding, whatever is split."""
    pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True)
    for one, two in pairs:
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert relative_error(one, two) <= 1e-5


@pytest.mark.parametrize("name", quick(ROWS, QUICK))
def test_surgery_keeps_what_is_split(name: str):
    """There and back: factorize, canonicalize, shrink, truncate, another form, merge;
    each equals what it gives on one device."""
    row = ROWS[name]
    models = [factored(model, row) for model in on_mesh(row)]
    optimizer = optax.adam(1e-2)

    def check(models: list[nnx.Module], v: str = "v") -> None:
        (factors,) = lr.find_factors(models[1]).values()
        split = {"u": row.u, v: row.v}
        for key, param in factors.params().items():
            stack = row.u[: len(factors.stack_shape)]
            whole = (*stack, *[None] * (param.ndim - len(stack)))
            assert spec_of(param) == split.get(key, whole), key
        assert spec_of(factors.rank) == (None,) * factors.rank.ndim
        assert_equal(*models)

    check(models)
    check([lr.canonicalize(model) for model in models])
    cut = [lr.truncate(model, half(model)) for model in models]
    check(cut)
    check([lr.truncate(model, half(model), form="gauge") for model in models], "rest")
    states = [optimizer.init(pure_params(model)) for model in models]
    pairs = zip(models, states, strict=True)
    shrunk = [lr.shrink(m, half(m), state, optimizer) for m, state in pairs]
    check([result.model for result in shrunk])
    moments = shrunk[1].opt_state[0].mu
    assert specs_of(moments) == specs_of(pure_params(cut[1]))
    merged = [lr.merge(model) for model in models]
    assert spec_of(kernel_of(merged[1])) == row.merged
    assert_equal(*merged)


def test_a_size_that_does_not_divide_is_whole():
    """An odd rank on a split rank axis, and back on one that divides."""
    model = lr.factorize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    model.factors.u.set_value(put(model.factors.u[...], mesh_of(), "fsdp", "tensor"))
    model.factors.v.set_value(put(model.factors.v[...], mesh_of(), "tensor", "fsdp"))
    for rank, axis in {6: "tensor", 5: None}.items():
        factors = lr.truncate(model, {"": rank}).factors
        assert spec_of(factors.u) == ("fsdp", axis)
        assert spec_of(factors.v) == (axis, "fsdp")


OPTIMIZERS = {**ELEMENTWISE, **{name: row[0] for name, row in RESTARTED.items()}}


@pytest.mark.parametrize("name", quick(OPTIMIZERS, ("injected", "adafactor")))
def test_every_optimizer_state_stays_where_it_is(name: str):
    """Cut moments are split as before; counters and what starts anew stay on the
    mesh; the numbers are those of one device."""
    optimizer = OPTIMIZERS[name]
    models = [masked_net(), spread(masked_net(), mesh_of())]
    states = [
        jax.tree.map(lambda x: x + 1, optimizer.init(pure_params(model)))
        for model in models
    ]
    states[1] = placement.beside(states[1], nnx.state(models[1]))
    shrunk = [
        lr.shrink(model, RANKS, state, optimizer)
        for model, state in zip(models, states, strict=True)
    ]
    old, new = specs_of(states[1]), specs_of(shrunk[1].opt_state)
    assert new == old or name in RESTARTED
    pairs = zip(*(jax.tree.leaves(result.opt_state) for result in shrunk), strict=True)
    for one, two in pairs:
        assert relative_error(one, two) <= 1e-6


def test_converted_and_restarted_states_stay_on_the_mesh():
    """A momentum of a kernel, pulled back to the factors, is split as these are."""
    _, model = on_mesh(ROWS["linear"])
    small = factored(model, ROWS["linear"])
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    optimizer = optax.sgd(schedule, momentum=0.9)
    old = jax.tree.map(jnp.ones_like, optimizer.init(pure_params(model)))
    old = placement.beside(old, nnx.state(model))

    def to_old(params):
        merged = nnx.clone(small)
        nnx.update(merged, params)
        return pure_params(lr.merge(merged))

    params = pure_params(small)
    fresh = optimizer.init(params)
    state, restarted = convert_opt_state(old, fresh, to_old, params)
    assert restarted == [] and specs_of(state[0].trace) == specs_of(params)
    assert spec_of(restart_schedules(state, fresh)[1].count) == ()


def test_changing_ranks_on_a_mesh_does_not_recompile():
    """The new rank lies where the old one did; anywhere else it would be another
    program."""
    model = spread(lr.factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), mesh_of())
    graph = nnx.graphdef(model)
    run = jax.jit(lambda state: nnx.merge(graph, state).factors.matrix())
    for rank in (3, 1):
        lr.set_ranks(model, {"": rank})
        run(nnx.as_pure(nnx.state(model)))
    assert run._cache_size() == 1
    model.factors.rank.set_value(jnp.int32(2))
    run(nnx.as_pure(nnx.state(model)))
    assert run._cache_size() == 2


def test_what_reads_a_split_model_reads_the_same():
    """Ranks to shrink to, importances, stable ranks, the summary, selection."""
    models = [masked_net(), spread(masked_net(), mesh_of())]

    def read(model: nnx.Module) -> Any:
        factors = lr.find_factors(model)
        return (
            lr.get_ranks(model),
            lr.tail_ranks(model, threshold=1e-3),
            lr.tail_ranks(model, threshold=0.8),
            curves.column_importances(factors),
            curves.stable_ranks(factorization.kernel_matrices(model)),
            [row.effective_rank for row in lr.summary(model).rows],
            selection.ranks_for(model, energy=0.9),
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *map(read, models)
    )


def test_helpers_leave_other_shardings_and_traces_alone():
    mesh = mesh_of()
    sharding = NamedSharding(mesh, P("fsdp", ("data", "tensor")))
    assert placement.respec(sharding, (4, 6)).spec == P("fsdp", None)
    assert placement.respec(sharding, (4, 8)).spec == sharding.spec
    assert placement.respec(sharding, (4,)).spec == P("fsdp")
    assert placement.respec(sharding, (0, 3)).spec == P("fsdp", None)
    alone = SingleDeviceSharding(jax.devices()[3])
    assert placement.respec(alone, (4,)) is alone
    array = jnp.ones((4, 8))
    assert all(placement.kept(array, x) is array for x in (alone, None))
    abstract = NamedSharding(mesh.abstract_mesh, P("fsdp"))
    assert placement.kept(array, abstract) is array
    struct = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding)
    assert placement.sharding_of(struct) == sharding
    assert placement.sharding_of(np.ones(3)) is None
    seen = []

    @jax.jit
    def traced(x):
        seen.append(placement.sharding_of(x))
        assert placement.kept(x, sharding) is x
        return x

    traced(placement.kept(array, sharding))
    assert seen == [None]
    np.testing.assert_array_equal(
        placement.to_host(placement.kept(array, sharding)), array
    )
