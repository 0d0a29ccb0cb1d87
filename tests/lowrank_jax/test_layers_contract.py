"""The contract of every low-rank layer: one table, one test for each point.

A new layer, or a new option of one, is one more row. Numbers in docstrings are points
of the contract: (1) full rank, (2) lower ranks, (3) gradients, (9) dtypes, transforms.
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors, Rank
from lowrank_jax.layers import (
    LAYERS,
    LowRankConv,
    LowRankConvTranspose,
    LowRankEinsum,
    LowRankEmbed,
    LowRankLayer,
    LowRankLinear,
    LowRankLinearGeneral,
    conv,
    embed,
    linear,
)

Order = Literal["factored", "merged"]
ORDERS = ("factored", "merged")


def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers by NumPy: Flax's initialisers compile anew for every shape."""
    seed = (
        0 if isinstance(key, jax.core.Tracer) else np.asarray(jax.random.key_data(key))
    )
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer and what to call it with.

    Args:
      kind: The dense type.
      args: Its positional arguments.
      shape: Shape of the input.
      batch: Axis of the examples, in the input and the output; None if there is none.
      call: Name of the method.
      options: Its keyword arguments.
      fold: Options of the fold.
    """

    kind: type[nnx.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    batch: int | None = 0
    call: str = "__call__"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fold: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """Options, and a bias that is not zero, so that losing or doubling it shows."""
        if self.kind is nnx.Embed:
            return {"embedding_init": draw, **self.options}
        return {"kernel_init": draw, "bias_init": draw, **self.options}

    def dense(self, **options: Any) -> nnx.Module:
        return self.kind(*self.args, **{**self.keywords, **options}, rngs=nnx.Rngs(0))

    def inputs(self) -> jax.Array:
        random = np.random.default_rng(1)
        if self.kind is nnx.Embed and self.call == "__call__":
            return jnp.asarray(random.integers(0, self.args[0], self.shape), jnp.int32)
        return jnp.asarray(random.normal(size=self.shape), jnp.float32)


def image(
    kernel_size: tuple[int, ...] = (3, 2),
    *,
    channels: tuple[int, int] = (2, 3),
    lead: tuple[int, ...] = (2,),
    size: tuple[int, ...] = (5, 4),
    scheme: int = 0,
    **options: Any,
) -> Row:
    return Row(
        nnx.Conv,
        (*channels, kernel_size),
        (*lead, *size, channels[0]),
        batch=0 if lead else None,
        options=options,
        fold={"scheme": scheme},
    )


def spread(
    kernel_size: tuple[int, ...] = (3, 2),
    *,
    lead: tuple[int, ...] = (2,),
    size: tuple[int, ...] = (4, 3),
    scheme: int = 0,
    **options: Any,
) -> Row:
    """A transposed convolution."""
    return Row(
        nnx.ConvTranspose,
        (3, 4, kernel_size),
        (*lead, *size, 3),
        batch=0 if lead else None,
        options=options,
        fold={"scheme": scheme},
    )


line = functools.partial(image, (3,), size=(6,))
grouped = functools.partial(image, channels=(4, 6), feature_group_count=2)
ROWS = {
    "linear": Row(nnx.Linear, (4, 3), (3, 4)),
    "linear, tokens": Row(nnx.Linear, (3, 4), (2, 5, 3)),
    "linear, no bias": Row(nnx.Linear, (4, 3), (3, 4), options={"use_bias": False}),
    "linear, no batch axis": Row(nnx.Linear, (4, 3), (4,), batch=None),
    "general": Row(nnx.LinearGeneral, (4, 3), (3, 4)),
    "general, heads": Row(nnx.LinearGeneral, (4, (2, 3)), (2, 3, 4)),
    "general, axes": Row(
        nnx.LinearGeneral, ((2, 3), (2, 2)), (3, 2, 4, 3), options={"axis": (1, -1)}
    ),
    "general, batch axis": Row(
        nnx.LinearGeneral, (4, 3), (2, 3, 4), batch=1, options={"batch_axis": {0: 2}}
    ),
    "general, batch axes, no bias": Row(
        nnx.LinearGeneral,
        ((2, 2), (3,)),
        (2, 3, 2, 2, 2),
        batch=2,
        options={"batch_axis": {0: 2, 1: 3}, "axis": (3, 4), "use_bias": False},
    ),
    "einsum": Row(nnx.Einsum, ("bi,io->bo", (4, 3), (3,)), (3, 4)),
    "einsum, heads out": Row(
        nnx.Einsum, ("bti,ihd->bhtd", (4, 2, 2), (2, 2)), (2, 3, 4)
    ),
    "einsum, heads in": Row(nnx.Einsum, ("bthd,hdo->bto", (2, 2, 3)), (2, 3, 2, 2)),
    "einsum, shared axis": Row(
        nnx.Einsum, ("bthi,ohi->btho", (3, 2, 4), (2, 3)), (3, 2, 2, 4)
    ),
    "einsum, ellipsis": Row(nnx.Einsum, ("...i, io -> ...o", (4, 3), (3,)), (3, 2, 4)),
    "einsum, ellipsis and shared axis": Row(
        nnx.Einsum, ("...hi,hio->...ho", (2, 4, 3), (2, 3)), (3, 2, 2, 4)
    ),
    "einsum, summed axis": Row(nnx.Einsum, ("bti,io->bo", (4, 3), (3,)), (3, 2, 4)),
    "embed, lookup": Row(nnx.Embed, (6, 3), (3, 4)),
    "embed, attend": Row(nnx.Embed, (6, 3), (3, 2, 3), call="attend"),
    "embed, one row": Row(nnx.Embed, (1, 3), (3, 4)),
    "conv": image(kernel_dilation=(1, 2)),
    "conv, scheme 1": image(scheme=1),
    "conv, scheme 2": image(scheme=2),
    "conv, scheme 3": image(scheme=3),
    "conv, strides, scheme 1": image(strides=(2, 3), scheme=1, size=(6, 7)),
    "conv, strides, scheme 2": image(strides=(2, 3), scheme=2, size=(6, 7)),
    "conv, strides, scheme 3": image(strides=(2, 1), scheme=3, padding="VALID"),
    "conv, explicit padding, scheme 1": image(scheme=1, padding=((0, 2), (1, 0))),
    "conv, explicit padding, scheme 3": image(scheme=3, padding=(2, 1)),
    "conv, int padding, scheme 2": image(scheme=2, padding=1),
    "conv, CIRCULAR, scheme 2": image(scheme=2, padding="CIRCULAR"),
    "conv, REFLECT, scheme 1": image((3, 3), scheme=1, padding="REFLECT"),
    "conv, kernel dilation, scheme 2": image(scheme=2, kernel_dilation=(2, 3)),
    "conv, input dilation, scheme 1": image(scheme=1, input_dilation=(2, 3), padding=1),
    "conv, input dilation, scheme 3": image(
        scheme=3, input_dilation=2, strides=3, padding=(0, 1)
    ),
    "conv, groups": grouped(),
    "conv, groups, scheme 1": grouped(scheme=1, strides=2),
    "conv, groups, scheme 3": grouped(scheme=3, padding="VALID"),
    "conv, depthwise": image(channels=(3, 6), feature_group_count=3),
    "conv, no bias, no strides": image(use_bias=False, strides=None),
    "conv, no batch axis": image(lead=()),
    "conv, two batch axes": image(lead=(2, 3)),
    "conv, two batch axes, groups": grouped(lead=(2, 3)),
    "conv 1-D, CAUSAL": line(padding="CAUSAL", kernel_dilation=2),
    "conv 1-D, CAUSAL, scheme 3": line(padding="CAUSAL", scheme=3),
    "conv 3-D": image((2, 1, 3), size=(3, 2, 4)),
    "conv 3-D, scheme 3": image((2, 1, 3), size=(3, 2, 4), strides=(1, 2, 2), scheme=3),
    "conv transpose": spread(strides=(2, 3)),
    "conv transpose, scheme 1": spread(strides=2, scheme=1, padding="VALID"),
    "conv transpose, scheme 2": spread(strides=(1, 2), scheme=2, padding=((1, 0), 2)),
    "conv transpose, scheme 3": spread(strides=2, scheme=3),
    "conv transpose, CIRCULAR": spread(strides=2, padding="CIRCULAR"),
    "conv transpose, CIRCULAR, scheme 3": spread(padding="CIRCULAR", scheme=3),
    "conv transpose, dilation": spread(kernel_dilation=(2, 1), use_bias=False),
    "conv transpose, turned": spread(strides=2, transpose_kernel=True),
    "conv transpose, turned, scheme 1": spread(
        (3, 3), strides=2, transpose_kernel=True, scheme=1, padding="CIRCULAR"
    ),
    "conv transpose, turned, scheme 3": spread(
        strides=3, transpose_kernel=True, scheme=3, padding="VALID"
    ),
    "conv transpose, no batch axis": spread(lead=(), strides=2),
    "conv transpose, two batch axes, scheme 2": spread(lead=(2, 2), scheme=2),
    "conv transpose 1-D": spread((3,), size=(4,), strides=2),
}
ONE_OF_EACH = (
    "linear",
    "general, batch axis",
    "einsum, shared axis",
    "embed, lookup",
    "embed, attend",
    "conv, groups, scheme 1",
    "conv transpose, turned, scheme 1",
)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Compiling is nearly all of what these tests take; nothing runs for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@contextlib.contextmanager
def forced(order: Order | None):
    """Makes the layers multiply in this order, or for None in the one they choose."""
    with contextlib.ExitStack() as stack:
        for module in (conv, embed, linear) if order else ():
            stack.enter_context(
                mock.patch.object(
                    module, "merged_is_cheaper", lambda *_, **__: order == "merged"
                )
            )
        yield


def forward(layer: nnx.Module, row: Row, inputs, order: Order | None = None):
    with forced(order):
        return getattr(layer, row.call)(inputs)


def name_of(row: Row) -> str:
    return next(name for name, other in ROWS.items() if other is row)


@functools.cache
def parts(name: str, with_s: bool, options: tuple[tuple[str, Any], ...]):
    row = ROWS[name]
    dense, low_rank = row.dense(**dict(options)), LAYERS[row.kind]
    factors = None
    if with_s:
        fold = low_rank.fold_of(dense, **row.fold)
        matrix = fold.to_matrix(getattr(dense, low_rank.kernel_name)[...])
        factors = Factors.from_matrix(matrix, fold.full_rank, with_s=True)
    return nnx.split(low_rank.from_dense(dense, factors=factors, **row.fold))


def factorized(row: Row, with_s: bool = False, **options: Any) -> LowRankLayer:
    """The layer of a row in low-rank form at full rank, a new one every time."""
    return nnx.merge(*parts(name_of(row), with_s, tuple(options.items())), copy=True)


def at_rank(layer: LowRankLayer, rank) -> LowRankLayer:
    """A copy of the layer with this active rank, which may be traced."""
    layer = nnx.clone(layer)
    layer.factors.set_rank(rank)
    return layer


def cut_at(layer: LowRankLayer, rank: int) -> LowRankLayer:
    layer = nnx.clone(layer)
    layer.factors.cut(rank)
    return layer


def nearest(row: Row, rank: int) -> nnx.Module:
    """The dense layer with its kernel's matrix cut at a rank by NumPy in float64."""
    dense, low_rank = row.dense(), LAYERS[row.kind]
    fold, name = low_rank.fold_of(dense, **row.fold), low_rank.kernel_name
    matrix = np.asarray(fold.to_matrix(getattr(dense, name)[...]), np.float64)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    cut = (u * s[..., None, :])[..., :rank] @ v[..., :rank, :]
    setattr(dense, name, nnx.Param(fold.to_kernel(jnp.asarray(cut, jnp.float32))))
    return dense


def forward_all(layers: list[nnx.Module], row: Row, inputs):
    """The outputs of layers of equal shapes, one after the other."""
    graph, states = nnx.split(layers[0])[0], [nnx.state(layer) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return jax.vmap(lambda x: forward(nnx.merge(graph, x), row, inputs))(stacked)


@functools.cache
def outputs_by_rank(name: str) -> dict[str, np.ndarray]:
    """All that a layer gives at each of its ranks, in one compiled call.

    Ranks are mapped wherever shapes allow it, so that there is less to compile.
    """
    row = ROWS[name]
    layers = {with_s: factorized(row, with_s) for with_s in (False, True)}
    ranks = range(layers[False].factors.max_rank + 1)
    near = [nearest(row, rank) for rank in ranks]
    cut = {s: [cut_at(layer, r) for r in ranks] for s, layer in layers.items()}
    graph, state = nnx.split((row.dense(), layers, near, cut))

    @jax.jit
    def every(inputs, state):
        dense, layers, near, cut = nnx.merge(graph, state)
        results = {
            "dense": forward(dense, row, inputs),
            "nearest": forward_all(near, row, inputs),
            "cut": jnp.stack([forward(x, row, inputs) for x in cut[False]]),
        }
        for with_s, layer in layers.items():
            for order in ORDERS:
                results[f"masked, {order}, with_s={with_s}"] = jax.vmap(
                    lambda r, x=layer, o=order: forward(at_rank(x, r), row, inputs, o)
                )(jnp.arange(len(ranks)))
            results[f"masked, to_dense, with_s={with_s}"] = jax.vmap(
                lambda r, x=layer: forward(at_rank(x, r).to_dense(), row, inputs)
            )(jnp.arange(len(ranks)))
            results[f"cut, to_dense, with_s={with_s}"] = forward_all(
                [x.to_dense() for x in cut[with_s]], row, inputs
            )
        return results

    return jax.tree.map(np.asarray, every(row.inputs(), state))


def test_full_rank_equals_dense(row):
    """(1) In both orders, which so agree with one another, with `s` and without."""
    results = dict(outputs_by_rank(name_of(row)))
    expected = results.pop("dense")
    for name, outputs in results.items():
        assert outputs.dtype == expected.dtype
        assert relative_error(outputs[-1], expected) <= 1e-5, name


def test_masked_equals_cut_equals_merged(row):
    """(2) At every rank, and all equal NumPy's nearest kernel of that rank."""
    results = dict(outputs_by_rank(name_of(row)))
    results.pop("dense")
    for rank, expected in enumerate(results.pop("nearest")):
        for name, outputs in results.items():
            assert relative_error(outputs[rank], expected) <= 1e-5, (name, rank)


def test_cutting_leaves_only_the_active_columns(row):
    """(2) Arrays get smaller, and the rank is again the allocated one."""
    for with_s in (False, True):
        layer = cut_at(factorized(row, with_s), 1)
        assert layer.factors.max_rank == 1 and bool(
            np.all(layer.factors.rank[...] == 1)
        )
        assert all(x is None or 1 in x.shape[-2:] for x in layer.factors.arrays())


def test_gradients_are_those_of_the_dense_layer_and_zero_in_the_tail(row):
    """(3) Exactly zero past the rank, the chain rule before it, in both orders."""
    inputs, dense = row.inputs(), row.dense()
    layers = {with_s: factorized(row, with_s) for with_s in (False, True)}
    ranks = range(layers[False].factors.max_rank + 1)
    outputs = jax.eval_shape(lambda: forward(dense, row, inputs))
    target = jnp.asarray(np.random.default_rng(2).normal(size=outputs.shape), "float32")

    def gradient(layer, order=None):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params):
            layer = nnx.merge(graph, params, rest)
            return jnp.sum(target * forward(layer, row, inputs, order))

        return nnx.to_pure_dict(jax.grad(loss)(params))

    @jax.jit
    def every(state):
        dense, layers = nnx.merge(graph, state)
        by_rank = {
            f"{order}, with_s={with_s}": jax.vmap(
                lambda r, x=layer, o=order: gradient(at_rank(x, r), o)
            )(jnp.arange(len(ranks)))
            for with_s, layer in layers.items()
            for order in ORDERS
        }
        return gradient(dense), by_rank

    graph, state = nnx.split((dense, layers))
    expected, by_rank = jax.tree.map(np.asarray, every(state))
    by_matrix = layers[False].fold.to_matrix(
        jnp.asarray(expected.pop(layers[False].kernel_name))
    )
    for (with_s, layer), order in itertools.product(layers.items(), ORDERS):
        found = by_rank[f"{order}, with_s={with_s}"]
        factors = found.pop("factors")
        chain = chain_rule(layer.factors, np.asarray(by_matrix))
        for rank in ranks:
            for name in factors:
                where = (order, with_s, rank, name)
                value = columns_last(name, factors[name][rank])
                np.testing.assert_array_equal(value[..., rank:], 0, str(where))
                head, rule = value[..., :rank], chain[name][..., :rank]
                assert relative_error(head, rule) <= 1e-5, where
                moves = head if name == "s" else np.any(head, axis=-2)
                assert np.all(moves), where
            assert found.keys() == expected.keys()
            for name in expected:
                assert relative_error(found[name][rank], expected[name]) <= 1e-5


def columns_last(name: str, gradient: np.ndarray) -> np.ndarray:
    return np.swapaxes(gradient, -1, -2) if name == "v" else gradient


def chain_rule(factors: Factors, gradient: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of `u`, `v` (transposed) and `s` from that of `W = u diag(|s|) v`."""
    u, s, v = (None if x is None else np.asarray(x, float) for x in factors.arrays())
    scale = np.ones((1, 1)) if s is None else np.abs(s)[..., None, :]
    columns = gradient @ np.swapaxes(v, -1, -2)
    sign = 1 if s is None else np.sign(s)
    return {
        "u": columns * scale,
        "v": np.swapaxes(gradient, -1, -2) @ (u * scale),
        "s": sign * np.sum(u * columns, axis=-2),
    }


def test_changing_the_rank_changes_no_key_of_jit(row):
    """(3) Graph, shapes and dtypes stay, so nothing is compiled anew."""
    layer = factorized(row)
    graph, state = nnx.split(layer)
    ranks = [0, np.zeros(layer.factors.stack_shape, int).tolist(), jnp.int32(1)]
    for rank in ranks:
        other_graph, other = nnx.split(at_rank(layer, rank))
        assert other_graph == graph and hash(other_graph) == hash(graph)
        assert jax.tree.map(jax.typeof, other) == jax.tree.map(jax.typeof, state)


def test_ranks_per_example_equal_a_loop_over_the_examples(row):
    """(2) Each example at its own rank, for each matrix of a stack its own."""
    if row.batch is None:
        pytest.skip("there are no examples")
    layer = factorized(row)
    stack, examples = layer.factors.stack_shape, row.shape[row.batch]
    ranks = np.arange(examples) % (layer.factors.max_rank + 1)
    ranks = np.broadcast_to(ranks, (*stack, examples))
    ranks = np.random.default_rng(3).permuted(ranks, axis=-1)

    @jax.jit
    def both(inputs, ranks):
        alone = [
            forward(
                at_rank(layer, ranks[..., example]),
                row,
                jax.lax.slice_in_dim(inputs, example, example + 1, axis=row.batch),
            )
            for example in range(examples)
        ]
        together = forward(at_rank(layer, ranks), row, inputs)
        return together, jnp.concatenate(alone, axis=row.batch)

    outputs, expected = both(row.inputs(), jnp.asarray(ranks))
    assert relative_error(outputs, expected) <= 1e-5, ranks
    assert np.any(ranks != ranks.flat[0])


def test_bfloat16_is_close_to_float32(row):
    """(9) Computed in bfloat16, in both orders: 2e-2, and the output is bfloat16."""
    check_bfloat16(row, jnp.float32)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_parameters_are_close_to_float32(name):
    """(9) Factors kept in bfloat16 come from an SVD in float32."""
    check_bfloat16(ROWS[name], jnp.bfloat16)


def check_bfloat16(row: Row, param_dtype) -> None:
    layer = factorized(row, dtype=jnp.bfloat16, param_dtype=param_dtype)
    graph, state = nnx.split(layer)
    params = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert {x.dtype for x in params} == {jnp.dtype(param_dtype)}

    @jax.jit
    def every(inputs, state):
        layer = nnx.merge(graph, state)
        return [forward(layer, row, inputs, order) for order in ORDERS]

    for outputs in every(row.inputs(), state):
        assert outputs.dtype == jnp.bfloat16
        assert relative_error(outputs, outputs_by_rank(name_of(row))["dense"]) <= 2e-2


@pytest.mark.parametrize(
    "options", [{}, {"dtype": jnp.bfloat16}], ids=["no dtype", "bfloat16"]
)
def test_output_shape_and_dtype_are_those_of_the_dense_layer(row, options):
    """(9) For bfloat16 inputs, in both orders and at rank 0."""
    inputs = jax.eval_shape(row.inputs)
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = jax.ShapeDtypeStruct(inputs.shape, jnp.bfloat16)
    layer, dense = factorized(row, **options), row.dense(**options)
    expected = jax.eval_shape(lambda x: forward(dense, row, x), inputs)
    for order in ORDERS:
        assert jax.eval_shape(lambda x, o=order: forward(layer, row, x, o), inputs) == (
            expected
        )
    empty = cut_at(layer, 0)
    assert jax.eval_shape(lambda x: forward(empty, row, x), inputs) == expected


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_vmap_over_inputs_equals_a_loop(name):
    """(9) Ranks and parameters are mapped by the tests above."""
    row = ROWS[name]
    layer, dense = factorized(row), row.dense()
    graph, state = nnx.split((layer, dense))

    @jax.jit
    def both(batches, state):
        layer, dense = nnx.merge(graph, state)
        loop = jnp.stack([forward(dense, row, batch) for batch in batches])
        return loop, [
            jax.vmap(lambda x, o=order: forward(layer, row, x, o))(batches)
            for order in ORDERS
        ]

    inputs = row.inputs()
    expected, mapped = both(np.stack([inputs, np.flip(inputs)]), state)
    for outputs in mapped:
        assert relative_error(outputs, expected) <= 1e-5


def test_made_directly_equals_made_from_dense(row):
    """The same keys give the same numbers, attributes and graph, below full rank."""
    low_rank = LAYERS[row.kind]
    max_rank = factorized(row).factors.max_rank - 1
    born = low_rank.from_dense(row.dense(), max_rank=max_rank, **row.fold)
    made = low_rank(
        *row.args, **row.keywords, **row.fold, max_rank=max_rank, rngs=nnx.Rngs(0)
    )
    (graph, state), (expected_graph, expected) = nnx.split(made), nnx.split(born)
    assert graph == expected_graph
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert made.factors.max_rank == max_rank


def test_from_dense_and_back_keeps_all_but_the_kernel(row):
    """The dense layer is not touched; what comes back has its type and attributes."""
    dense = row.dense()
    before = jax.tree.map(np.asarray, nnx.state(dense))
    layer = LAYERS[row.kind].from_dense(dense, **row.fold)
    back = layer.to_dense()
    assert (type(layer), type(back)) == (LAYERS[row.kind], row.kind)
    assert nnx.split(back)[0] == nnx.split(dense)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(dense), before)
    if getattr(dense, "bias", None) is not None:
        assert layer.bias is dense.bias


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_jit_equals_no_jit(name):
    """(9) Everything above is compiled; eager code does the same."""
    row, results = ROWS[name], outputs_by_rank(name)
    for rank in (0, 1):
        eager = forward(at_rank(factorized(row), rank), row, row.inputs())
        assert relative_error(eager, results["nearest"][rank]) <= 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_all_ranks_are_one_trace(name):
    """(3) Counted for one layer of each kind, a rank per example too."""
    row, traces = ROWS[name], []

    @functools.partial(jax.jit, static_argnames="graph")
    def step(graph, state, inputs):
        traces.append(None)
        return forward(nnx.merge(graph, state), row, inputs)

    layer, inputs = factorized(row), row.inputs()
    for rank in (0, 1, 2):
        step(*nnx.split(at_rank(layer, rank)), inputs)
    assert len(traces) == 1
    shape = (*layer.factors.stack_shape, row.shape[row.batch])
    for rank in (0, 1, 2):
        step(*nnx.split(at_rank(layer, np.full(shape, rank))), inputs)
    assert len(traces) == 2


def many(rows: int) -> dict[str, tuple[LowRankLayer, jax.Array, str]]:
    """One layer of each kind, matrices 8 x 8, and an input that makes `rows` rows."""
    rngs = nnx.Rngs(0)
    return {
        "linear": (LowRankLinear(8, 8, rngs=rngs), jnp.ones((rows, 8)), "__call__"),
        "general": (
            LowRankLinearGeneral(8, (2, 4), rngs=rngs),
            jnp.ones((rows, 8)),
            "__call__",
        ),
        "einsum": (
            LowRankEinsum("bi,io->bo", (8, 8), rngs=rngs),
            jnp.ones((rows, 8)),
            "__call__",
        ),
        "conv": (
            LowRankConv(4, 8, (2,), padding="VALID", rngs=rngs),
            jnp.ones((1, rows + 1, 4)),
            "__call__",
        ),
        "conv transpose": (
            LowRankConvTranspose(8, 4, (2,), scheme=3, rngs=rngs),
            jnp.ones((1, rows, 8)),
            "__call__",
        ),
        "attend": (LowRankEmbed(8, 8, rngs=rngs), jnp.ones((rows, 8)), "attend"),
        "lookup": (
            LowRankEmbed(8, 8, rngs=rngs),
            jnp.zeros(rows, jnp.int32),
            "__call__",
        ),
    }


@pytest.mark.parametrize(("rows", "merges"), [(2, False), (64, True)])
def test_few_rows_are_factored_and_many_merged(rows, merges):
    """The cheaper order by itself: merging 8 x 8 at rank 8 pays above 8 rows."""
    for name, (layer, inputs, call) in many(rows).items():
        with mock.patch.object(
            Factors, "matrix", autospec=True, side_effect=Factors.matrix
        ) as matrix:
            nnx.eval_shape(lambda x, i, c=call: getattr(x, c)(i), layer, inputs)
        assert matrix.called == merges, name


LAYERS_DEEP = 3
DEEP = {
    "linear": (lambda rngs: LowRankLinear(4, 4, rngs=rngs), (3, 4), [3, 0, 4]),
    "grouped conv": (
        lambda rngs: LowRankConv(4, 4, (3, 3), feature_group_count=2, rngs=rngs),
        (3, 4, 4, 4),
        [[1, 2], [2, 0], [2, 2]],
    ),
}


def deep(make) -> LowRankLayer:
    """A stack of three layers with arrays that have a leading layer axis."""
    return nnx.vmap(lambda rngs: make(rngs))(nnx.Rngs(0).split(LAYERS_DEEP))


def scan(layers, inputs, axes):
    """Layer after layer, the state mapped as `axes` say."""
    axes = nnx.StateAxes({**axes, ...: None})

    @functools.partial(nnx.scan, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x)

    return forward(layers, inputs)


def loop(layers, inputs, ranks):
    """The same layer by layer, at given ranks, each with its own arrays."""
    graph, state = nnx.split(layers)
    for index in range(LAYERS_DEEP):
        layer = nnx.merge(graph, jax.tree.map(lambda x, i=index: x[i], state))
        layer.factors.set_rank(jnp.asarray(ranks[index]))
        inputs = layer(inputs)
    return inputs


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", DEEP)
def test_scan_over_layers_equals_a_loop(name, per_example):
    """(9) A rank for each layer, or for each layer and example."""
    make, shape, ranks = DEEP[name]
    layers = deep(make)
    inputs = jnp.asarray(np.random.default_rng(4).normal(size=shape), jnp.float32)
    if per_example:
        ranks = np.stack([ranks, np.roll(ranks, 1, 0), np.full_like(ranks, 1)], -1)
    expected = loop(layers, inputs, ranks)
    layers.factors.set_rank(jnp.asarray(ranks))
    outputs = scan(layers, inputs, {(nnx.Param, Rank): 0})
    assert relative_error(outputs, expected) <= 1e-5


def test_ranks_that_scan_does_not_map_are_an_error():
    """Ranks of three layers must not be read as those of three examples."""
    layers = deep(DEEP["linear"][0])
    layers.factors.set_rank([1, 2, 3])
    with pytest.raises(ValueError, match=r"rank: must have 0 axes .*nnx\.StateAxes"):
        scan(layers, jnp.ones((LAYERS_DEEP, 4)), {nnx.Param: 0})


def test_ranks_per_example_without_a_layer_axis_are_an_error_in_scan():
    """Ranks of three examples must not be read as those of three layers."""
    layers = deep(DEEP["linear"][0])
    layers.factors.set_rank(np.ones((LAYERS_DEEP, 3), int))
    layers.factors.rank.set_value(jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"rank: must have 1 axes .*nnx\.StateAxes"):
        scan(layers, jnp.ones((3, 4)), {(nnx.Param, Rank): 0})


@pytest.mark.parametrize("max_rank", [-1, 4])
def test_a_rank_that_the_matrix_has_not_is_an_error(max_rank):
    with pytest.raises(ValueError, match=rf"must be in \[0, 3\], got {max_rank}\."):
        LowRankLinear(4, 3, max_rank=max_rank, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", [LowRankConv, LowRankConvTranspose])
def test_a_masked_convolution_is_an_error(kind):
    mask = jnp.ones((3, 2, 3))
    with pytest.raises(ValueError, match="masked kernel is not a product of low rank"):
        kind(2, 3, (3,), mask=mask, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_merged_kernel_reads_as_the_twins(name):
    """At the active rank, without being a variable, and never to be written to."""
    row, layer = ROWS[name], at_rank(factorized(ROWS[name]), 1)
    kernel, merged = getattr(layer, layer.kernel_name), layer.merged_kernel()
    assert kernel.shape == getattr(row.dense(), layer.kernel_name).shape
    assert kernel.dtype == merged.dtype and kernel.ndim == merged.ndim
    for read in (kernel[...], kernel.value, kernel.get_value(), kernel.T.T, kernel * 1):
        np.testing.assert_array_equal(read, merged)
    assert layer.kernel_name not in nnx.to_pure_dict(nnx.state(layer))
    for write in (
        lambda: setattr(layer, layer.kernel_name, nnx.Param(merged)),
        lambda: kernel.set_value(merged),
        lambda: setattr(kernel, "value", merged),
        lambda: kernel.set_raw_value(merged),
        lambda: setattr(kernel, "raw_value", merged),
        lambda: operator.setitem(kernel, 0, 0),
    ):
        with pytest.raises(UserError, match="merged kernel is read-only, got a write"):
            write()


def test_factors_that_do_not_fit_the_kernel_are_an_error():
    """Both shapes are named; neither a rank is dropped nor a matrix of another size
    taken."""
    dense = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    wrong = Factors.from_matrix(jnp.ones((9, 7)), 2)
    with pytest.raises(UserError, match=r"shape \(6, 4\) .* got \(9, 7\)"):
        LowRankLinear.from_dense(dense, factors=wrong)
    stacked = Factors.from_matrix(jnp.ones((2, 6, 4)), 2)
    with pytest.raises(UserError, match=r"shape \(6, 4\) .* got \(2, 6, 4\)"):
        LowRankLinear.from_dense(dense, factors=stacked)
    right = Factors.from_matrix(jnp.ones((6, 4)), 4)
    with pytest.raises(UserError, match="not both, got max_rank 2 and factors of ran"):
        LowRankLinear.from_dense(dense, max_rank=2, factors=right)


def test_a_scheme_for_another_number_of_axes_is_an_error():
    with pytest.raises(ValueError, match="must be 0 or 3, or for two spatial axes"):
        LowRankConv(2, 3, (3,), scheme=1, rngs=nnx.Rngs(0))


def test_an_einsum_that_is_no_matrix_is_an_error():
    with pytest.raises(ValueError, match="to be a matrix. Keep this layer dense"):
        LowRankEinsum("bij,ij->bi", (3, 4), rngs=nnx.Rngs(0))


def test_an_equation_in_the_call_is_an_error():
    layer = LowRankEinsum("bi,io->bo", (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="equation is fixed when the layer is made"):
        layer(jnp.ones((2, 3)), "bi,oi->bo")


@pytest.mark.parametrize(
    "name", ["linear", "general, batch axis", "einsum", "embed, attend", "conv, groups"]
)
def test_ranks_for_another_batch_size_are_an_error(name):
    row = ROWS[name]
    layer, inputs = factorized(row), row.inputs()
    examples = inputs.shape[row.batch] + 1
    stack = layer.factors.stack_shape
    layer.factors.set_rank(jnp.ones((*stack, examples), jnp.int32))
    with pytest.raises(ValueError, match=f"got {examples} for a batch of"):
        nnx.eval_shape(lambda x, i: getattr(x, row.call)(i), layer, inputs)


@pytest.mark.parametrize("name", [x for x, row in ROWS.items() if row.batch is None])
def test_ranks_per_example_need_a_batch_axis(name):
    """Even where the first axis happens to be as long as there are ranks."""
    row = ROWS[name]
    layer, inputs = factorized(row), row.inputs()
    for ranks in {inputs.shape[0], layer.factors.max_rank}:
        layer.factors.set_rank(jnp.ones(ranks, jnp.int32))
        with pytest.raises(ValueError, match="one rank per example needs"):
            layer(inputs)


@pytest.mark.parametrize("name", ["linear", "conv, groups", "embed, lookup"])
def test_ranks_per_example_cannot_be_merged(name):
    layer = factorized(ROWS[name])
    stack = layer.factors.stack_shape
    layer.factors.set_rank(jnp.ones((*stack, 2), jnp.int32))
    with pytest.raises(ValueError, match="must be one number to merge the factors"):
        layer.to_dense()
