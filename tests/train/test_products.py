"""The application's products of linear layers against Flax's: the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import factorize
from train import products

RNGS = nnx.Rngs(0)
LAYERS = {
    "linear": nnx.Linear(4, 6, rngs=RNGS),
    "no bias": nnx.Linear(4, 6, use_bias=False, rngs=RNGS),
    "precision": nnx.Linear(4, 6, precision=jax.lax.Precision.HIGHEST, rngs=RNGS),
    "heads": nnx.LinearGeneral(4, (2, 3), rngs=RNGS),
    "two axes in": nnx.LinearGeneral((5, 4), 6, axis=(-2, -1), rngs=RNGS),
    "a first axis": nnx.LinearGeneral(3, 6, axis=0, rngs=RNGS),
    "a batch axis": nnx.LinearGeneral(4, 6, batch_axis={0: 3}, rngs=RNGS),
    "attention": nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=RNGS),
}


def compute(layer, inputs):
    """Gradients by the layer and its inputs, and the outputs."""

    def value(layer, inputs):
        outputs = layer(inputs)
        weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.sum(weights * outputs), outputs

    return nnx.value_and_grad(value, argnums=(0, 1), has_aux=True)(layer, inputs)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_flax(name, low_rank):
    layer = nnx.clone(LAYERS[name])
    if low_rank:
        layer = factorize(layer, [(".*", {"max_rank": 2})])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)))
    expected = compute(layer, inputs)
    products.use_in(layer)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        nnx.as_pure(compute(layer, inputs)),
        nnx.as_pure(expected),
    )


@pytest.mark.parametrize("low_rank", [False, True])
def test_no_product_sums_over_two_axes(low_rank):
    """Flax's gradient by the kernel does."""
    layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    if low_rank:
        layer = factorize(layer, [(".*", {"max_rank": 2})])

    def contracted():
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        gradient = jax.jit(
            jax.grad(lambda params, x: jnp.sum(nnx.merge(graph, params, rest)(x) ** 2))
        )
        program = gradient.lower(params, jnp.ones((3, 5, 4))).as_text()
        return {
            axes.count(",")
            for axes in re.findall(r"contracting_dims = \[(.*?)\]", program)
        }

    assert 1 in contracted()
    products.use_in(layer)
    assert contracted() == {0}


def test_what_somebody_chose_is_left_alone():
    def own(*args, **options):
        return jax.lax.dot_general(*args, **options)

    layer = nnx.Linear(2, 2, dot_general=own, rngs=nnx.Rngs(0))
    products.use_in(layer)
    assert layer.dot_general is own
