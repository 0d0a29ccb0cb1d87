"""Rank-major factors: their beginnings are views, products by them are the layers'."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from reference import relative_error

import lowrank_jax as lr
from lowrank_jax import rank_major
from lowrank_jax.paths import find_rank_arrays
from lowrank_jax.ranks import at_fraction

KINDS = [saved_models.Net, saved_models.Scanned]


def values(model: nnx.Module) -> dict[str, jax.Array]:
    return {key: x.variable[...] for key, x in find_rank_arrays(model).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_is_put_back_is_the_cut_model(kind, fraction):
    """Bit for bit, from factors of these ranks and from views of higher ones."""
    model = saved_models.low_rank(kind, with_s=True)
    ranks = at_fraction(lr.max_ranks(model), fraction)
    cut = values(lr.truncate(model, ranks))
    whole = rank_major.rank_major(model, lr.max_ranks(model))
    for factors in (
        rank_major.rank_major(model, ranks),
        rank_major.views(model, whole, ranks),
        whole,
    ):
        empty = saved_models.structure(kind, with_s=True)
        rank_major.put(empty, factors, ranks)
        found = values(empty)
        assert found.keys() == cut.keys()
        for key, array in cut.items():
            np.testing.assert_array_equal(found[key], array, strict=True)


def test_views_share_the_memory_that_they_keep_alive():
    """What is rank-major already is not copied either."""
    model = lr.factorize(nnx.Linear(32, 24, rngs=nnx.Rngs(0)))
    whole = rank_major.rank_major(model, {"": 24})
    assert whole["v"] is model.factors.v[...] and whole["u"].shape == (24, 32)
    starts = {key: array.unsafe_buffer_pointer() for key, array in whole.items()}
    wanted = {key: np.array(array[:5]) for key, array in whole.items()}
    views = rank_major.views(model, whole, {"": 5})
    del model, whole
    gc.collect()
    taken = [jnp.zeros((24, 32)) + n for n in range(20)]  # what was freed is used again
    for key, view in views.items():
        assert view.unsafe_buffer_pointer() == starts[key]
        np.testing.assert_array_equal(view, wanted[key])
    assert len(taken) == 20


class Heads(nnx.Module):
    """Linear layers into heads, out of them, of another precision, and a dense one."""

    def __init__(self, rngs: nnx.Rngs):
        self.split = nnx.LinearGeneral(12, (3, 5), rngs=rngs)
        self.join = nnx.LinearGeneral((3, 5), 12, axis=(-2, -1), rngs=rngs)
        self.half = nnx.Linear(12, 6, dtype=jnp.bfloat16, precision="high", rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, inputs):
        hidden = self.join(jnp.tanh(self.split(inputs)))
        return self.dense(self.half(hidden))


@pytest.mark.parametrize(
    ("shape", "few"),
    [((7, 12), True), ((2, 3, 12), True), ((1, 12), False), ((3, 11, 12), False)],
)
def test_products_from_the_other_side_are_the_same(shape, few):
    """Of every linear layer's first factor, at several axes; the second's stays, and so
    do those of one row, and of many."""
    rules = [("dense", "dense"), (".*", "full")]
    model = lr.factorize(Heads(nnx.Rngs(0)), rules)
    model = lr.truncate(model, {"split": 3, "join": 4, "half": 2})
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    before, plain = model(inputs), traced(model, inputs)
    rank_major.multiply_from_left(model)
    after, turned = model(inputs), traced(model, inputs)
    assert after.dtype == before.dtype and after.shape == before.shape
    assert relative_error(after, before) <= 1e-2  # of bfloat16
    model.half.dtype = jnp.float32
    assert relative_error(model(inputs), plain_half(model, inputs)) <= 1e-6
    rounds = [text.count("reduce_precision[") for text in (plain, turned)]
    assert rounds[1] - rounds[0] == (3 if few else 0)


def traced(model: nnx.Module, inputs: jax.Array) -> str:
    """The model's program; jax keeps those of a function that it has seen."""
    return str(jax.make_jaxpr(lambda inputs: model(inputs))(inputs))


def plain_half(model: nnx.Module, inputs: jax.Array) -> jax.Array:
    """The model with Flax's own products."""
    model = nnx.clone(model)
    for layer in (model.split, model.join, model.half):
        layer.hidden_product = None
    return model(inputs)


@pytest.mark.parametrize("sizes", [(64, 48), (16, 16)])
def test_xla_does_not_turn_them_back(sizes):
    """The result of the first product is `(r, b)`; without, it is `(b, r)`. So it is
    where both factors have one shape."""
    jax.config.update("jax_disable_most_optimizations", False)
    model = lr.factorize(nnx.Linear(*sizes, rngs=nnx.Rngs(0)))
    buffers, ranks = rank_major.rank_major(model, {"": 16}), {"": 16}
    graphdef, state = nnx.split(model)
    inputs = jnp.ones((8, sizes[0]))

    def run(turn: bool):
        def forward(factors, inputs):
            model = nnx.merge(graphdef, state, copy=True)
            rank_major.put(model, factors, ranks)
            lr.set_ranks(model, ranks)
            if turn:
                rank_major.multiply_from_left(model)
            return model(inputs)

        return jax.jit(forward).lower(buffers, inputs).compile().as_text()

    try:
        assert run(True).count("f32[16,8]{1,0} dot(") == 1
        assert "f32[16,8]{1,0} dot(" not in (text := run(False))
        assert "f32[8,16]{1,0} dot(" in text
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
