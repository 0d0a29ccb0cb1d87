"""The contract of every low-rank layer: one table, one test for each point.

A new layer, or a new option of one, is one more row, in `layer_rows.py`. Numbers in
docstrings are points of the contract: (1) full rank, (2) lower ranks, (3) gradients,
and in `test_layers_transforms.py` (9) dtypes, transforms.
"""

import functools
import itertools
from unittest import mock

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
    at_rank,
    cut_at,
    factorized,
    forward,
    name_of,
    outputs_by_rank,
)
from reference import relative_error

from lowrank_jax.factors import Factors
from lowrank_jax.layers import (
    LAYERS,
    LowRankConv,
    LowRankConvTranspose,
    LowRankEinsum,
    LowRankEmbed,
    LowRankLayer,
    LowRankLinear,
    LowRankLinearGeneral,
)

row = layer_rows.row


def test_every_layer_has_a_row():
    """Those of the library; others may have been registered by tests."""
    ours = {kind for kind, low_rank in LAYERS.items() if is_ours(low_rank)}
    assert len(ours) >= 6 and ours <= {row.kind for row in ROWS.values()}


def is_ours(low_rank: type[LowRankLayer]) -> bool:
    return low_rank.__module__.startswith("lowrank_jax.layers.")


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
