"""Models in the manner of public ones, whose code knows nothing of low rank.

They read kernels and tables, subclass Flax's layers, bring linear classes of their own,
hold matrices themselves. One table of models, one test for each promise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_models import ROWS, Row, Scaled, models
from reference import relative_error

from lowrank_jax import checkpoint
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.factorization import factorize, rules_of
from lowrank_jax.layers import LowRankLayer, LowRankParam
from lowrank_jax.paths import find_factors, find_layers
from lowrank_jax.surgery import merge, truncate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*value' access:DeprecationWarning"),
    pytest.mark.usefixtures("registered"),
]


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def run(model: nnx.Module, inputs: jax.Array) -> jax.Array:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, inputs)


def lower(model: nnx.Module) -> dict[str, Any]:
    """About half of each rank, of stacks a different one for each matrix."""
    return {
        path: (np.asarray(rank) + np.arange(np.size(rank)).reshape(np.shape(rank))) // 2
        for path, rank in max_ranks(model).items()
    }


def plain(ranks: dict[str, Any]) -> dict[str, Any]:
    return {path: np.asarray(rank).tolist() for path, rank in ranks.items()}


def test_full_rank_equals_dense(row):
    """Every layer that the row names is factored, none in silence left dense."""
    dense, low = models(row)
    assert set(find_factors(low)) == row.paths
    assert relative_error(run(low, row.inputs), run(dense, row.inputs)) <= 1e-5
    assert relative_error(low(row.inputs), dense(row.inputs)) <= 1e-5


def test_masked_equals_cut_equals_merged(row):
    """At half the ranks; merged models have the structure of the dense one."""
    dense, low = models(row)
    ranks = plain(lower(low))
    set_ranks(low, ranks)
    expected = run(low, row.inputs)
    assert relative_error(expected, run(dense, row.inputs)) > 1e-3
    cut, merged = truncate(low, ranks), merge(low)
    assert nnx.graphdef(merged) == nnx.graphdef(dense)
    assert relative_error(run(cut, row.inputs), expected) <= 1e-5
    assert relative_error(run(merged, row.inputs), expected) <= 1e-5
    assert relative_error(run(merge(cut), row.inputs), expected) <= 1e-5


def test_gradients_reach_the_head_and_not_the_tail(row):
    """Exactly zero past the rank, in every Param of the factors, and only there."""
    _, low = models(row)
    ranks = lower(low)
    set_ranks(low, plain(ranks))
    graph, params, rest = nnx.split(low, nnx.Param, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(row.inputs)))

        return jax.grad(loss)(params)

    grads = nnx.merge(graph, gradient(params), rest)
    for path, factors in find_factors(grads).items():
        u, v = np.asarray(factors.u[...]), np.asarray(factors.v[...])
        for columns in (u, np.swapaxes(v, -1, -2)):
            acts = np.arange(columns.shape[-1]) < ranks[path][..., None]
            moved = np.any(columns, axis=-2)
            np.testing.assert_array_equal(moved, acts, str(path))


def test_a_checkpoint_brings_the_model_back(row, tmp_path):
    """Saved masked, loaded into a fresh twin, and by the rules that it knows."""
    dense, low = models(row)
    set_ranks(low, plain(lower(low)))
    checkpoint.save(tmp_path / "saved", low)
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    graph, state = nnx.split(dense)
    zeros = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    fresh = factorize(zeros, rules_of(low))
    loaded = checkpoint.load(saved, fresh)
    np.testing.assert_array_equal(run(loaded, row.inputs), run(low, row.inputs))


def test_the_count_is_that_of_the_dense_twin(row):
    """Parameters and MACs agree, and what is not seen is named."""
    dense, low = models(row)
    example = jax.ShapeDtypeStruct((1, *row.shape[1:]), row.inputs.dtype)
    cost, twin = count(low, example), count(dense, example)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(dense, nnx.Param))]
    assert cost.dense_params == twin.dense_params == sum(sizes)
    assert cost.dense_macs == twin.dense_macs > 0
    assert cost.unseen == twin.unseen and set(cost.unseen) == row.unseen
    small = truncate(low, dict.fromkeys(find_factors(low), 1))
    sizes = [x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param))]
    ones = jax.tree.map(np.ones_like, max_ranks(low))
    assert cost.params(plain(ones)) == sum(sizes)


def test_a_tied_head_stays_tied():
    """One table: in the twin, after merging, and in its gradient."""
    _, low = models(ROWS["tied Param"])
    assert isinstance(low.a_head, LowRankParam)
    assert low.a_head.factors is low.embed.factors
    merged = merge(low)
    assert merged.a_head is merged.embed.embedding
    assert rules_of(low) == rules_of(factorize(merged))


def test_stacked_subclasses_and_params_run_in_scan():
    """Modules stacked by `nnx.vmap`, each layer at a rank of its own."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = Scaled(4, 4, rngs=rngs)
            self.mixer = nnx.Param(rngs.params.normal((4, 4)))
            self.norm = nnx.LayerNorm(4, rngs=rngs)

        def __call__(self, inputs):
            return self.norm(jnp.tanh(self.linear(inputs)) @ self.mixer)

    stack = nnx.vmap(Block)(nnx.Rngs(0).split(3))
    low = factorize(stack, [("mixer", {"param": True}), (".*", "full")])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)

    def scan(blocks):
        run = nnx.scan(
            lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return run(blocks, inputs)

    assert relative_error(scan(low), scan(stack)) <= 1e-5
    set_ranks(low, {"linear": [1, 2, 3], "mixer": [4, 2, 0]})
    assert relative_error(scan(low), scan(merge(low))) <= 1e-5
    assert all(
        isinstance(layer, LowRankLayer) for layer, _ in find_layers(low).values()
    )
