"""The application's convolution against XLA's: the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import factorize
from train import convolution

CASES = {
    "same": {},
    "valid": {"padding": "VALID"},
    "strides": {"strides": (2, 1), "padding": ((0, 2), (1, 1))},
    "large strides": {"strides": 3, "kernel_size": (2, 2), "padding": "VALID"},
    "one place": {"kernel_size": (1, 1)},
    "one place, strides": {"kernel_size": (1, 1), "strides": 2},
    "circular": {"padding": "CIRCULAR"},
    "one axis": {"kernel_size": (4,)},
    "groups": {"feature_group_count": 2},
    "dilated": {"kernel_dilation": 2},
    "dilated inputs": {"input_dilation": 2, "padding": ((1, 2), (2, 1))},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
}


@pytest.mark.parametrize(
    "low_rank", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_flax(case, low_rank):
    """By the inputs and all parameters, dense and low-rank; outside of a branch and in
    one."""
    options = {"kernel_size": (3, 3), "rngs": nnx.Rngs(0), **CASES[case]}
    layer = nnx.Conv(4, 6, **options)
    if low_rank:
        layer = factorize(layer, [(".*", {"max_rank": 2})])
    sides = (9, 8)[: len(options["kernel_size"])]
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, *sides, 4)))

    def value(layer, inputs):
        outputs = layer(inputs)
        weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.sum(weights * outputs), outputs

    compute = nnx.value_and_grad(value, argnums=(0, 1), has_aux=True)
    expected = compute(layer, inputs)
    convolution.use_in(layer)
    assert layer.conv_general_dilated is convolution.convolve
    graph, state = nnx.split(layer)

    def branch(state, inputs):
        return compute(nnx.merge(graph, state), inputs)

    in_a_branch = jax.jit(
        lambda n, *given: jax.lax.switch(n, [branch, branch], *given)
    )(0, state, inputs)
    for found in (compute(layer, inputs), in_a_branch):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            nnx.as_pure(found),
            nnx.as_pure(expected),
        )


def test_gradients_have_the_form_that_is_fast():
    """Channels last, nothing reversed, in every convolution of the program; XLA's own
    gradient by the kernel is not in this form."""
    layer = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    inputs = jnp.ones((2, 8, 8, 4))

    def forms(layer):
        graph, state = nnx.split(layer)
        gradient = jax.jit(
            jax.grad(
                lambda state, inputs: jnp.sum(nnx.merge(graph, state)(inputs) ** 2),
                argnums=(0, 1),
            )
        )
        program = gradient.lower(state, inputs).as_text()
        return re.findall(r"dim_numbers = (.*?), window.*reverse = (.*?)}", program)

    fast = ("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]", "[false, false]")
    assert any(form != fast for form in forms(layer))
    convolution.use_in(layer)
    found = forms(layer)
    assert len(found) == 3 and all(form == fast for form in found)


@pytest.mark.parametrize(
    "options", [{}, {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}]
)
def test_code_of_somebody_calls_it_as_it_likes(options):
    """Channels first, and no keywords but its own, also where the kernel has one
    place."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
    for place in ((1, 1), (3, 2)):
        kernel = jnp.asarray(rng.normal(size=(6, 3, *place)), jnp.float32)
        given = (inputs, kernel, (1, 1), "SAME")
        np.testing.assert_array_equal(
            convolution.convolve(*given, **options),
            jax.lax.conv_general_dilated(*given, **options),
        )


def test_what_somebody_chose_is_left_alone():
    def own(*args, **options):
        return jax.lax.conv_general_dilated(*args, **options)

    layer = nnx.Conv(1, 1, (3, 3), conv_general_dilated=own, rngs=nnx.Rngs(0))
    convolution.use_in(layer)
    assert layer.conv_general_dilated is own
