"""Convolutions by blocks of pixels against XLA's: the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import factorize
from train import convolution, narrow

CASES = {
    "same": {},
    "valid": {"padding": "VALID"},
    "uneven padding": {"padding": ((0, 2), (1, 3))},
    "rows at strides": {"strides": (2, 1)},
    "columns at strides": {"strides": (1, 2)},
    "circular": {"padding": "CIRCULAR"},
    "causal": {"padding": "CAUSAL", "kernel_size": (3,)},
    "one axis": {"kernel_size": (4,)},
    "three axes": {"kernel_size": (3, 3, 3)},
    "a row": {"kernel_size": (1, 5)},
    "a column": {"kernel_size": (5, 1)},
    "large": {"kernel_size": (7, 7), "padding": "VALID"},
    "dilated": {"kernel_dilation": 2},
    "groups": {"feature_group_count": 2},
}
WIDTHS = {"2 to 6": (2, 6), "4 to 18": (4, 18)}
"""Channels and filters: of blocks of four columns, and of two."""


def make(case: str, widths: str, low_rank: bool) -> tuple[nnx.Module, tuple[int, ...]]:
    """The layer, and the shape of one input."""
    channels, filters = WIDTHS[widths]
    options = {"kernel_size": (3, 3), "rngs": nnx.Rngs(0), **CASES[case]}
    layer = nnx.Conv(channels, filters, **options)
    if low_rank:
        layer = factorize(layer, [(".*", {"max_rank": 2})])
    return layer, (channels, len(options["kernel_size"]))


@pytest.mark.parametrize(
    "low_rank", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_flax(case, widths, low_rank):
    """On sides that blocks divide, and on such as leave a part of one, or are less."""
    layer, (channels, axes) = make(case, widths, low_rank)
    moved = nnx.clone(layer)
    convolution.use_in(moved, narrow.convolve)
    assert moved.conv_general_dilated is narrow.convolve
    rng = np.random.default_rng(0)
    for sides in ((4, 8, 10), (5, 9, 7)):
        inputs = jnp.asarray(rng.normal(size=(2, *sides[-axes:], channels)))
        found, expected = moved(inputs), layer(inputs)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_of_pixels_is_one():
    """Of the program: 1 to 6 channels by 5x5 kernels in blocks of 2 rows of 4 columns
    have 4 channels and 48 filters, at half of the rows; XLA's own has one channel."""
    layer = nnx.Conv(1, 6, (5, 5), padding="VALID", rngs=nnx.Rngs(0))

    def shapes(layer: nnx.Module) -> list[str]:
        graph, state = nnx.split(layer)
        program = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
        text = program.lower(state, jnp.ones((3, 28, 28, 1))).as_text()
        found = re.search(
            r"convolution.*tensor<(\S*)xf32>, .*tensor<(\S*)xf32>\)", text
        )
        return list(found.groups())

    assert shapes(layer) == ["3x28x28x1", "5x5x1x6"]
    convolution.use_in(layer, narrow.convolve)
    assert shapes(layer) == ["3x28x7x4", "6x2x4x48"]


def test_blocks_are_made_where_they_pay():
    """Few channels and filters, kernels of three columns and more, columns one by
    one."""
    assert narrow.block((5, 5, 1, 6), (1, 1)) == (2, 4)  # LeNet
    assert narrow.block((5, 5, 6, 16), (1, 1)) == (2, 2)
    assert narrow.block((3, 3, 6, 16), (2, 1)) == (1, 2)
    assert narrow.block((5, 1, 6), (1,)) == (1, 4)
    for shape, strides in (
        ((3, 3, 64, 64), (1, 1)),  # ResNet-18
        ((3, 3, 3, 64), (1, 1)),
        ((3, 3, 3, 16), (2, 2)),
        ((1, 1, 6, 16), (1, 1)),
        ((5, 1, 6, 16), (1, 1)),
    ):
        assert narrow.block(shape, strides) == (1, 1)


def test_code_of_somebody_calls_it_as_it_likes():
    """Channels first, and no keywords but its own."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(2, 3, 8, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(6, 3, 3, 3)), jnp.float32)
    for options in ({}, {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}):
        np.testing.assert_array_equal(
            narrow.convolve(inputs, kernel, (1, 1), "SAME", **options),
            jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", **options),
        )
