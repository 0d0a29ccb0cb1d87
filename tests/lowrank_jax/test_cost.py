"""Counts against the literature, by hand, and what XLA reports."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import folds
from lowrank_jax.cost import LayerCost, merged_is_cheaper
from lowrank_jax.forms import GaugeCost
from lowrank_jax.layers import LowRankConv, LowRankEinsum, LowRankEmbed, LowRankLinear
from lowrank_jax.layers import LowRankLinearGeneral as LowRankGeneral
from lowrank_jax.ranks import flatten_rank

# LeNet at 28x28x1 by hand: matrix, positions, biases (methods.md section 1).
LENET = [
    (LayerCost(25, 6, 1, 576, 576, 576), 6),  # conv 5x5 1 -> 6, 24x24 pixels
    (LayerCost(150, 16, 1, 64, 64, 64), 16),  # conv 5x5 6 -> 16, 8x8 pixels
    (LayerCost(256, 120, 1, 1, 1, 1, 1), 120),
    (LayerCost(120, 84, 1, 1, 1, 1, 1), 84),
    (LayerCost(84, 10, 1, 1, 1, 1, 1), 10),
]


def struct(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def layer_cost(make, inputs: jax.ShapeDtypeStruct) -> LayerCost:
    """The cost of a low-rank layer at the shapes that it computes by itself."""
    layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    outputs = nnx.eval_shape(lambda layer, x: layer(x), layer, inputs)
    return type(layer).cost_of(layer, layer.fold, inputs, outputs)


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_lenet_costs_what_the_literature_counts():
    """44,426 parameters and 281,640 MACs; factored at full rank 66,274 and 340,316."""
    biases = sum(bias for _, bias in LENET)
    full = [(cost, min(cost.in_size, cost.out_size)) for cost, _ in LENET]
    assert biases + sum(cost.dense_params for cost, _ in LENET) == 44_426
    assert sum(cost.dense_macs for cost, _ in LENET) == 281_640
    assert biases + sum(cost.factored_params(rank) for cost, rank in full) == 66_274
    assert sum(cost.factored_macs(rank) for cost, rank in full) == 340_316
    assert biases + sum(cost.params(rank) for cost, rank in full) == 44_426
    assert sum(cost.macs(rank) for cost, rank in full) == 281_640


def test_lenet_layers_count_as_by_hand():
    """The layers find their matrices and positions themselves."""
    options = {"padding": "VALID"}
    layers = [
        (partial(LowRankConv, 1, 6, (5, 5), **options), struct(1, 28, 28, 1)),
        (partial(LowRankConv, 6, 16, (5, 5), **options), struct(1, 12, 12, 6)),
        (partial(LowRankLinear, 256, 120), struct(1, 256)),
        (partial(LowRankLinear, 120, 84), struct(1, 120)),
        (partial(LowRankLinear, 84, 10), struct(1, 84)),
    ]
    assert [layer_cost(*layer) for layer in layers] == [cost for cost, _ in LENET]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scheme", range(4))
def test_conv_macs_are_the_formulas(scheme, stride):
    """Padding counted; the first convolution strides its own axes only."""
    k, c, f, rank, side = 3, 4, 6, 2, 8
    layer = partial(LowRankConv, c, f, (k, k), stride, scheme=scheme)
    cost = layer_cost(layer, struct(1, side, side, c))
    out = side // stride
    first, second = {
        0: (out * out * k * k * c, out * out * f),
        1: (side * out * k * c, out * out * k * f),
        2: (out * side * k * c, out * out * k * f),
        3: (side * side * c, out * out * k * k * f),
    }[scheme]
    assert cost.dense_macs == out * out * k * k * c * f
    assert cost.factored_macs(rank) == rank * (first + second)


def test_grouped_convolutions_and_stacks_count_every_matrix():
    """A matrix per group, or per entry of a shared axis."""
    conv = partial(LowRankConv, 4, 6, (3, 3), feature_group_count=2)
    cost = layer_cost(conv, struct(1, 5, 5, 4))
    assert (cost.matrices, cost.in_size, cost.out_size) == (2, 18, 3)
    assert cost.dense_macs == 25 * 3 * 3 * 2 * 6
    einsum = partial(LowRankEinsum, "bthi,hio->btho", (2, 5, 3))
    cost = layer_cost(einsum, struct(1, 7, 2, 5))
    assert cost == LayerCost(5, 3, 2, 7, 7, 7)
    general = partial(LowRankGeneral, 5, 3, batch_axis={0: 4})
    assert layer_cost(general, struct(4, 1, 5)) == LayerCost(5, 3, 4, 1, 1, 1)


def test_looking_up_costs_nothing_but_the_second_product():
    tokens = struct(1, 7, dtype=jnp.int32)
    assert layer_cost(partial(LowRankEmbed, 20, 6), tokens) == LayerCost(
        20, 6, 1, 0, 0, 7
    )
    embed = nnx.Embed(20, 6, rngs=nnx.Rngs(0))
    fold = LowRankEmbed.fold_of(embed)
    attend = LowRankEmbed.cost_of(embed, fold, struct(1, 7, 6), struct(1, 7, 20))
    assert attend == LayerCost(20, 6, 1, 7, 7, 7)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_products_cost_what_xla_reports(rank):
    """Two operations for each MAC, exactly, dense and in both products."""
    rows, inputs, outputs = 8, 16, 12
    cost = LayerCost(inputs, outputs, 1, rows, rows, rows)
    x, w = struct(rows, inputs), struct(inputs, outputs)
    u, v = struct(inputs, rank), struct(rank, outputs)
    assert xla_flops(lambda x, w: x @ w, x, w) == 2 * cost.dense_macs
    flops = xla_flops(lambda x, u, v: (x @ u) @ v, x, u, v)
    assert flops == 2 * cost.factored_macs(rank)
    assert cost.factored_params(rank) == np.prod(u.shape) + np.prod(v.shape)


@pytest.mark.parametrize("scheme", range(4))
def test_unpadded_convolutions_cost_what_xla_reports(scheme):
    """Strides and several examples included (XLA leaves padding out, so none here)."""
    fold = folds.conv_fold((3, 2), 4, 6, scheme=scheme)
    layer = partial(LowRankConv, 4, 6, (3, 2), (2, 1), padding="VALID", scheme=scheme)
    inputs = struct(5, 9, 8, 4)
    cost, rank = layer_cost(layer, inputs), 2

    def convolve(x, kernel, axes):
        strides = [s if a in axes else 1 for a, s in enumerate((2, 1))]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "VALID", dimension_numbers=numbers
        )

    def factored(x, u, v):
        hidden = convolve(x, fold.first_kernel(u), fold.first_axes)
        return convolve(hidden, fold.second_kernel(v), fold.second_axes)

    kernel = struct(3, 2, 4, 6)
    flops = xla_flops(lambda x, k: convolve(x, k, (0, 1)), inputs, kernel)
    assert flops == 2 * cost.dense_macs
    u, v = struct(fold.input_size, rank), struct(rank, fold.output_size)
    assert xla_flops(factored, inputs, u, v) == 2 * cost.factored_macs(rank)


def test_the_gauge_form_spares_its_identity():
    """r (i + o - r) numbers; MACs as many where the layer skips it, else r (i + o)."""
    base = LayerCost(6, 4, 2, 10, 10, 10)
    costs = [
        GaugeCost(6, 4, 2, 10, 10, 10, spared_positions=spared) for spared in (0, 10)
    ]
    assert [costs[0].params(rank) for rank in range(5)] == [0, 18, 32, 42, 48]
    assert [costs[1].macs(rank) for rank in range(5)] == [0, 180, 320, 420, 480]
    assert [costs[0].macs(rank) for rank in range(5)] == [0, 200, 400, 480, 480]
    assert costs[0].dense_macs == base.dense_macs == 480


def test_a_layer_costs_the_least_of_its_forms():
    """Below break-even the factored form, above it the merged one."""
    cost = LayerCost(6, 4, 1, 10, 10, 10)
    assert [cost.params(rank) for rank in range(5)] == [0, 10, 20, 24, 24]
    assert [cost.factored_params(rank) for rank in range(5)] == [0, 10, 20, 30, 40]
    assert [cost.macs(rank) for rank in range(5)] == [0, 100, 200, 240, 240]


def test_the_least_is_taken_matrix_by_matrix():
    """A rank of each, one for all, or one for each of the first stack axis."""
    cost = LayerCost(6, 4, 4, 1, 1, 1)
    assert cost.params([0, 1, 2, 4]) == 0 + 10 + 20 + 24
    assert cost.macs([[0, 1], [2, 4]]) == 0 + 10 + 20 + 24
    assert cost.params(1) == 40
    assert cost.factored_macs([0, 1, 2, 4]) == 70


@pytest.mark.parametrize("rank", [[1, 2, 3], []])
def test_a_list_of_ranks_that_does_not_fit_is_an_error(rank):
    with pytest.raises(ValueError, match="one for each of 4 matrices, got"):
        LayerCost(6, 4, 4, 1, 1, 1).params(rank)


def test_ranks_are_flattened_row_by_row():
    assert flatten_rank(3) == [3]
    assert flatten_rank([[1, 2], [3]]) == [1, 2, 3]
    assert flatten_rank([]) == []


def test_the_order_is_the_one_with_fewer_operations_by_xla():
    """Forward and backward, where the operations of both differ."""

    def merged(x, u, v):
        return x @ (u @ v)

    def factored(x, u, v):
        return (x @ u) @ v

    chosen = set()
    for rows, (i, o, rank) in itertools.product(
        (1, 4, 64), ((8, 8, 8), (16, 8, 2), (8, 32, 7))
    ):
        arguments = struct(rows, i), struct(i, rank), struct(rank, o)
        choice = merged_is_cheaper(i, o, rank, rows, rows, rows)
        fewer = xla_flops(merged, *arguments) < xla_flops(factored, *arguments)
        assert choice == fewer, (rows, i, o, rank)
        chosen.add(choice)
    assert chosen == {True, False}


@pytest.mark.parametrize("rank", [1, 3, 5, 8, 12])
def test_the_order_for_a_batch_of_any_size_is_that_of_a_large_one(rank):
    """As `jax.export` has them; a rank of any size is taken to be low."""
    batch, any_rank = jax.export.symbolic_shape("batch, rank")
    for in_size, out_size, pixels in ((12, 12, 1), (12, 40, 9), (200, 13, 4)):
        sizes = (in_size, out_size, rank)
        large = [pixels * 10**6] * 3
        symbolic = [pixels * batch] * 3
        expected = merged_is_cheaper(*sizes, *large)
        assert merged_is_cheaper(*sizes, *symbolic) is bool(expected)
        assert not merged_is_cheaper(in_size, out_size, any_rank, *symbolic)
    assert {merged_is_cheaper(12, 12, r, *[batch] * 3) for r in (1, 12)} == {
        False,
        True,
    }
