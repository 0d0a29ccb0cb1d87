"""Small convolutional network with batch normalization.

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from train.models import norms
from train.models.sizes import check_sizes


class ConvBlock(nnx.Module):
    """A 3x3 convolution without bias, batch normalization, relu.

    Args:
      in_features: Channels in.
      out_features: Channels out.
      stride: Step of the convolution; 2 halves both sides, rounding up.
      rngs: Source of the initial values.
    """

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            in_features,
            out_features,
            (3, 3),
            strides=(stride, stride),
            padding="SAME",
            use_bias=False,
            rngs=rngs,
        )
        # Flax's momentum of 0.99 needs several hundred steps to forget its start.
        self.norm = norms.BatchNorm(out_features, momentum=0.9, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float[Array, "b _ _ _"]:
        """Returns the feature maps of the next width."""
        return nnx.relu(self.norm(self.conv(images)))


class ConvNet(nnx.Module):
    """`blocks/0`, `blocks/1`, ...; global average pooling; `head`.

    Every block but the first halves both sides, so images of any size will do.

    Args:
      in_features: Channels of the images.
      widths: Channels out of each block.
      num_classes: Number of logits.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes("convnet", widths=widths)
        self.blocks = nnx.List([])
        for index, width in enumerate(widths):
            stride = 1 if index == 0 else 2
            self.blocks.append(ConvBlock(in_features, width, stride, rngs=rngs))
            in_features = width
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        features = images
        for block in self.blocks:
            features = block(features)
        return self.head(features.mean(axis=(1, 2))).astype(jnp.float32)


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    widths: Sequence[int] = (32, 64, 128),
) -> ConvNet:
    """Builds a `ConvNet` for images of shape `image_shape` (x, y, c)."""
    return ConvNet(image_shape[-1], widths, num_classes, rngs=rngs)
