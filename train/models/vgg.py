"""VGG (Simonyan and Zisserman, 2015) for CIFAR: batch normalization, one linear layer.

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from lowrank_jax.errors import UserError
from train.models import norms
from train.models.pooling import max_pool_2x2

WIDTHS = (64, 128, 256, 512, 512)
# By depth (with the three linear layers of the paper): the convolutions of each stage.
DEPTHS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
# The smallest side that the pools leave one pixel of: one halving for each stage.
MIN_SIDE = 2 ** len(WIDTHS)


class ConvBlock(nnx.Module):
    """A 3x3 convolution, a normalization, relu, and 2x2 max pooling if `pools`.

    Args:
      in_features: Channels in.
      out_features: Channels out.
      pools: Whether to halve both sides, rounding down.
      norm: "batch" or "group".
      groups: Groups of a group normalization, or its channels if they are fewer.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pools: bool,
        *,
        norm: str,
        groups: int,
        rngs: nnx.Rngs,
    ):
        # The bias is idle before a normalization; the published counts include it.
        self.conv = nnx.Conv(
            in_features,
            out_features,
            (3, 3),
            padding=((1, 1), (1, 1)),
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = norms.make_norm(out_features, norm=norm, groups=groups, rngs=rngs)
        self.pools = pools

    def __call__(self, images: Float[Array, "b x y c"]) -> Float[Array, "b _ _ _"]:
        """Returns the feature maps of the next block."""
        features = self.norm(self.conv(images))
        return nnx.relu(max_pool_2x2(features) if self.pools else features)


class VGG(nnx.Module):
    """`blocks/0`, `blocks/1`, ... in five stages; global average pooling; `head`.

    VGG-19 has 20,040,522 parameters and 398.14 M MACs at 32x32x3, 10 classes.

    Args:
      image_shape: Shape (x, y, c) of one image.
      num_classes: Number of logits.
      depth: 11, 13, 16 or 19.
      norm: "batch", or "group", which holds no batch statistics.
      groups: Groups of each group normalization, or its channels if they are fewer.
      width_multiplier: Factor of all widths.
      rngs: Source of the initial values.

    Raises:
      ValueError: An unknown depth or norm, a side shorter than 32 pixels, groups that
        do not divide a width, or a multiplier that gives widths that are not whole.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int,
        norm: str,
        groups: int,
        width_multiplier: float,
        rngs: nnx.Rngs,
    ):
        _check(image_shape, depth, norm, groups, width_multiplier)
        in_features = image_shape[-1]
        self.blocks = nnx.List([])
        for width, convs in zip(WIDTHS, DEPTHS[depth], strict=True):
            width = int(width * width_multiplier)
            for index in range(convs):
                pools = index == convs - 1
                self.blocks.append(
                    ConvBlock(
                        in_features, width, pools, norm=norm, groups=groups, rngs=rngs
                    )
                )
                in_features = width
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        features = images
        for block in self.blocks:
            features = block(features)
        return self.head(features.mean(axis=(1, 2))).astype(jnp.float32)


def _check(
    image_shape: tuple[int, int, int],
    depth: int,
    norm: str,
    groups: int,
    multiplier: float,
) -> None:
    x, y, _ = image_shape
    widths = [width * multiplier for width in WIDTHS]
    errors = []
    if depth not in DEPTHS:
        errors.append(
            f"vgg: depth must be one of {list(DEPTHS)}, got {depth!r}. Choose one of "
            "them."
        )
    if min(x, y) < MIN_SIDE:
        errors.append(
            f"vgg: image_shape must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got "
            f"{x}x{y}. Enlarge the images or use another model."
        )
    errors += norms.problems("vgg", norm, groups, widths, multiplier)
    if errors:
        raise UserError("\n".join(errors))


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    depth: int = 19,
    norm: str = "batch",
    groups: int = 32,
    width_multiplier: float = 1,
) -> VGG:
    """Builds a `VGG` for images of shape `image_shape` (x, y, c)."""
    return VGG(
        image_shape,
        num_classes,
        depth=depth,
        norm=norm,
        groups=groups,
        width_multiplier=width_multiplier,
        rngs=rngs,
    )
