"""Pooling of images. Letters: `b` batch, `x y` space, `c` channels."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def max_pool_2x2(images: Float[Array, "b x y c"]) -> Float[Array, "b _ _ c"]:
    """Takes the largest of each 2x2 pixels; a last odd row or column is dropped.

    As `nnx.max_pool`, by two maxima of slices, whose gradient takes a quarter of the
    time on CPUs. Where two pixels are equal and largest, they share the gradient.
    """
    x, y = (2 * (side // 2) for side in images.shape[1:3])
    rows = jnp.maximum(images[:, 0:x:2, :y], images[:, 1:x:2, :y])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
