"""Convolutions of few channels that are fast on CPUs: a block of pixels at a time.

Before XLA's code for CPUs multiplies, it gathers what each pixel of the outputs needs;
with few channels that takes far longer than the products. Here a block of pixels, 2
rows of 2 or 4 columns, is one pixel with more filters, each the kernel moved to its
place in the block, with zeros around it; and columns beside each other are channels of
one, by a change of shape. The same products are added, beside zeros.

500 inputs of LeNet on a core, with bias, pooling and relu: 1 to 6 channels by 5x5
kernels 3.4 ms for 19.6, 6 to 16 channels 1.9 for 3.8 (jax 0.10.2).

Letters: `b` batch, `s t k` space, `c` channels, `f` filters, `x y` a block's rows and
columns.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_jax.layers import conv
from train import convolution


def convolve(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b *t f"]:
    """Returns `lax.conv_general_dilated`, for forward passes."""
    if not convolution.is_plain(inputs.ndim, **options):
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    padding = convolution.explicit_padding(inputs, kernel, strides, padding)
    reach, width = kernel.shape[-3], inputs.shape[-2] + sum(padding[-1])
    rows, columns = block(kernel.shape, strides)
    if columns == 1 or width < reach + columns - 1:
        return conv.convolve(inputs, kernel, strides, padding, **options)
    return _by_blocks(inputs, kernel, rows, columns, strides, padding, options)


def block(kernel_shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Returns how many rows and columns of outputs are one pixel, 1 and 1 where it does
    not pay.

    From times of kernels of 2x2 to 7x7, of 1 to 10 channels and 8 to 64 filters: in
    larger blocks the products with zeros take longer than the gathering.
    """
    *others, reach, channels, filters = kernel_shape
    if strides[-1] != 1 or reach < 3 or channels > 8 or filters > 32:
        return 1, 1
    rows = 2 if others and others[-1] >= 3 and strides[-2] == 1 else 1
    return rows, 4 if channels <= 3 and filters <= 16 else 2


def _by_blocks(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    rows: int,
    columns: int,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: dict[str, Any],
) -> Float[Array, "b *t f"]:
    """The convolution, a block of this size at a time; rows of 1 keep their stride."""
    *others, (before, after) = padding
    reach, channels, filters = kernel.shape[-3:]
    width = before + inputs.shape[-2] + after - reach + 1  # of the outputs
    blocks, places = -(-width // columns), -(-(reach + columns - 1) // columns)
    across = blocks + places - 1  # blocks of the inputs
    left_over = across * columns - (width + reach - 1)
    wide = _padded(inputs, -2, before, after + left_over)
    wide = wide.reshape(*inputs.shape[:-2], across, columns * channels)
    if rows > 1:
        top, bottom = others[-1]
        height = top + inputs.shape[-3] + bottom - kernel.shape[-4] + 1
        others[-1] = (top, bottom + -height % rows)
        strides = (*strides[:-2], rows, 1)
    outputs = jax.lax.conv_general_dilated(
        wide,
        _over_block(kernel, rows, columns, places),
        strides,
        [*others, (0, 0)],
        **options,
    )
    if rows > 1:
        *lead, high, _, _ = outputs.shape
        outputs = outputs.reshape(*lead, high, blocks, rows, columns * filters)
        outputs = jnp.swapaxes(outputs, -3, -2)
        outputs = outputs.reshape(*lead, high * rows, blocks, columns * filters)
        outputs = outputs[..., :height, :, :]
    outputs = outputs.reshape(*outputs.shape[:-2], blocks * columns, filters)
    return outputs[..., :width, :]


def _over_block(
    kernel: Float[Array, "*k c f"], rows: int, columns: int, places: int
) -> Float[Array, "*j d xyf"]:
    """A kernel for each pixel of a block, moved to its place in it."""
    *others, reach, channels, filters = kernel.shape
    moved = []
    for row in range(rows):
        lower = kernel if rows == 1 else _padded(kernel, -4, row, rows - 1 - row)
        for column in range(columns):
            left = places * columns - reach - column
            moved.append(_padded(lower, -3, column, left))
    shape = (places, columns * channels, rows * columns * filters)
    return jnp.stack(moved, axis=-2).reshape(*moved[0].shape[:-3], *shape)


def _padded(array: Array, axis: int, before: int, after: int) -> Array:
    """Zeros beside an array along one axis; fewer than none cut it."""
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (before, after, 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)
