"""Convolutions whose gradients are fast wherever they stand in a program, on CPUs.

XLA brings convolutions into the form that its fast code for CPUs takes only where they
stand in the program itself. In a branch or a loop (a drawn size, parts of a batch) the
gradient by the kernel is left to plain loops, 60 to 70 times slower (jax 0.10.2). Here
it is written in that form: the same numbers, bit for bit.

Letters: `b` batch, `s t k` space, `c` channels, `f` filters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax.layers import conv
from lowrank_jax.paths import walk


def use_in(model: nnx.Module, function: Callable[..., Array] | None = None) -> None:
    """Sets the convolution of all layers of a model that have Flax's own, dense and
    low-rank, in place; on other devices than CPUs none.

    Args:
      model: The model.
      function: The convolution, `convolve` by default.
    """
    if jax.default_backend() != "cpu":
        return
    for _, node in walk(model):
        if getattr(node, "conv_general_dilated", None) is jax.lax.conv_general_dilated:
            node.conv_general_dilated = function or convolve


def convolve(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b *t f"]:
    """Returns `lax.conv_general_dilated`, for first derivatives by reverse mode."""
    if not is_plain(inputs.ndim, **options):
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    padding = explicit_padding(inputs, kernel, strides, padding)

    @jax.custom_vjp
    def value(inputs: Array, kernel: Array) -> Array:
        return conv.convolve(inputs, kernel, strides, padding, **options)

    def forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return value(inputs, kernel), (inputs, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        return _gradients(*saved, cotangent, strides, padding, options)

    value.defvjp(forward, backward)
    return value(inputs, kernel)


def explicit_padding(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> Sequence[tuple[int, int]]:
    """Returns the padding of each axis, where it may have a name."""
    if not isinstance(padding, str):
        return padding
    return jax.lax.padtype_to_pads(
        inputs.shape[1:-1], kernel.shape[:-2], strides, padding
    )


def is_plain(
    ndim: int,
    *,
    dimension_numbers: Any = None,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    **asked: Any,
) -> bool:
    """Whether channels are last, and nothing is dilated, grouped or asked for."""
    if not isinstance(dimension_numbers, jax.lax.ConvDimensionNumbers):
        return False
    spatial, numbers = range(1, ndim - 1), dimension_numbers
    last, kernel = (0, ndim - 1, *spatial), (ndim - 1, ndim - 2, *range(ndim - 2))
    dilations = {*(lhs_dilation or ()), *(rhs_dilation or ())}
    return (
        (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (last, kernel, last)
        and dilations <= {1}
        and feature_group_count == 1
        and all(value is None for value in asked.values())
    )


def _gradients(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    cotangent: Float[Array, "b *t f"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: dict[str, Any],
) -> tuple[Float[Array, "b *s c"], Float[Array, "*k c f"]]:
    """Gradients by the inputs and by the kernel, each a convolution with channels
    last."""
    spatial, ones = range(len(strides)), (1,) * len(strides)
    sides, places = inputs.shape[1:-1], kernel.shape[:-2]
    low = [before for before, _ in padding]
    reach = [strides[n] * (cotangent.shape[n + 1] - 1) for n in spatial]
    around = [
        (places[n] - 1 - low[n], sides[n] + low[n] - reach[n] - 1) for n in spatial
    ]
    within = [(low[n], reach[n] + places[n] - sides[n] - low[n]) for n in spatial]
    by_inputs = jax.lax.conv_general_dilated(
        cotangent,
        jnp.flip(kernel, spatial).swapaxes(-1, -2),
        ones,
        around,
        **{**options, "lhs_dilation": strides},
    )
    by_kernel = jax.lax.conv_general_dilated(  # channels as a batch, the batch summed
        inputs.swapaxes(0, -1),
        jnp.moveaxis(cotangent, 0, -2),
        ones,
        within,
        **{**options, "rhs_dilation": strides},
    )
    return by_inputs, jnp.moveaxis(by_kernel, 0, -2)
