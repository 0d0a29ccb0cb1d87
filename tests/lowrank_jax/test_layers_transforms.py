"""Point (9) of the contract of layers: dtypes, and what jit, vmap and scan keep.

The table is in `layer_rows.py`.
"""

import functools

import jax
import jax.numpy as jnp
import layer_rows
import numpy as np
import pytest
from flax import nnx
from layer_rows import (
    ONE_OF_EACH,
    ORDERS,
    ROWS,
    Row,
    at_rank,
    cut_at,
    factorized,
    forward,
    name_of,
    outputs_by_rank,
)
from reference import relative_error

from lowrank_jax.factors import Rank
from lowrank_jax.layers import LowRankConv, LowRankLayer, LowRankLinear

row = layer_rows.row


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


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_jit_equals_no_jit(name):
    """(9) Everything above is compiled; eager code does the same."""
    row, results = ROWS[name], outputs_by_rank(name)
    for rank in (0, 1):
        eager = forward(at_rank(factorized(row), rank), row, row.inputs())
        assert relative_error(eager, results["nearest"][rank]) <= 1e-5


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
