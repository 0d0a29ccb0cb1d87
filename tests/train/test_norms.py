"""The models' normalization against Flax's: the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models import norms

PAIRS = {
    "batch": (norms.BatchNorm, nnx.BatchNorm, (4,)),
    "group": (norms.GroupNorm, nnx.GroupNorm, (4, 2)),
    "one group": (norms.GroupNorm, nnx.GroupNorm, (4, 1)),
}


def build(kind: type, sizes: tuple[int, ...], **options):
    layer = kind(*sizes, rngs=nnx.Rngs(0), **options)
    for name, low in (("scale", 0.5), ("bias", -1.0)):
        if getattr(layer, name) is not None:
            values = low + jnp.arange(4.0) / 4
            setattr(layer, name, nnx.Param(values.astype(getattr(layer, name).dtype)))
    return layer


def draw(shape: tuple[int, ...], dtype="float32"):
    """Numbers far from a mean of 0 and a deviation of 1."""
    values = np.random.default_rng(0).normal(3.0, 2.0, shape)
    return jnp.asarray(values, dtype)


def compute(layer, x, **options):
    """Outputs, gradients by the layer and the inputs, and statistics that are kept."""

    def value(layer, x):
        outputs = layer(x, **options)
        weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.sum(weights * outputs), outputs

    gradient = nnx.value_and_grad(value, argnums=(0, 1), has_aux=True)
    found = gradient(layer, x)
    return nnx.as_pure((found, nnx.state(layer, nnx.BatchStat)))


def assert_alike(found, expected, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize(
    "shape", [(3, 5, 2, 4), pytest.param((6, 7, 4), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pair", PAIRS)
def test_values_gradients_and_statistics_are_those_of_flax(pair, shape):
    own, flax, sizes = PAIRS[pair]
    results = [compute(build(kind, sizes), draw(shape)) for kind in (own, flax)]
    assert_alike(*results)


@pytest.mark.parametrize("pair", PAIRS)
def test_no_sum_over_rows_is_left_to_xla(pair):
    """Flax's gradient has several."""
    own, flax, sizes = PAIRS[pair]

    def sums(kind):
        graph, params, rest = nnx.split(build(kind, sizes), nnx.Param, ...)

        def value(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            return layer(x).astype(jnp.float32)

        def gradient(params, x, cotangent):
            return jax.vjp(value, params, x)[1](cotangent)

        x = draw((64, 16, 4))
        program = jax.jit(gradient).lower(params, x, x).as_text()
        sums = [line for line in program.splitlines() if "stablehlo.reduce" in line]
        return [line for line in sums if "64x16" in line]

    assert sums(flax)
    assert not sums(own)


@pytest.mark.parametrize(
    "kind, options, called, dtype",
    [
        ("batch", {"axis": 1}, {}, "float32"),
        ("batch", {"use_scale": False}, {}, "float32"),
        ("batch", {"use_fast_variance": False}, {}, "float32"),
        ("batch", {"dtype": jnp.bfloat16}, {}, "bfloat16"),
        ("batch", {}, {"use_running_average": True}, "float32"),
        ("batch", {}, {"mask": jnp.arange(24).reshape(3, 2, 4) % 3 > 0}, "float32"),
        ("group", {"reduction_axes": (-1,)}, {}, "float32"),
        ("group", {}, {"mask": jnp.arange(24).reshape(3, 2, 4) % 3 > 0}, "float32"),
    ],
)
def test_what_else_flax_has_is_flax_own(kind, options, called, dtype):
    """Bit for bit."""
    own, flax, sizes = PAIRS[kind]
    shape = (3, 4, 2) if options.get("axis") == 1 else (3, 2, 4)
    results = [
        compute(build(each, sizes, **options), draw(shape, dtype), **called)
        for each in (own, flax)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
