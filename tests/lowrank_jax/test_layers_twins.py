"""Low-rank layers and their dense twins: made from one, back to one, read as one.

The table is in `layer_rows.py`.
"""

import operator

import jax
import layer_rows
import numpy as np
import pytest
from flax import nnx
from layer_rows import ONE_OF_EACH, ROWS, at_rank, factorized

from lowrank_jax.errors import UserError
from lowrank_jax.layers import LAYERS

row = layer_rows.row


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
