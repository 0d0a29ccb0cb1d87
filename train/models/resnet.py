"""Residual networks (He et al., 2016), for CIFAR and for ImageNet.

Batch normalization follows every convolution, the stride of a bottleneck is in its 3x3
convolution ("v1.5"), and where the shape changes the shortcut is a 1x1 convolution
("option B") at every depth; the CIFAR nets of the paper pad with zeros instead
("option A"), which saves 2,752 parameters. Parameters, and MACs of one example:

| depth | stem | images, classes | parameters | MACs |
|---|---|---|---|---|
| 8 | 3x3 | 32x32x3, 10 | 78,042 | 12.50 M |
| 18 | 3x3 | 32x32x3, 10 | 11,173,962 | 555.42 M |
| 20 | 3x3 | 32x32x3, 10 | 272,474 | 40.81 M |
| 32 | 3x3 | 32x32x3, 10 | 466,906 | 69.12 M |
| 50 | 7x7 | 224x224x3, 1000 | 25,557,032 | 4.089 G |
| 56 | 3x3 | 32x32x3, 10 | 855,770 | 125.75 M |

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from lowrank_jax.errors import UserError
from train.models import norms

STEMS = ("3x3", "7x7")


def _conv(
    in_features: int, out_features: int, size: int, stride: int = 1, *, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution without bias, padded by `size // 2` on all sides.

    With a stride of 2, "SAME" would pad 3x3 kernels on the far side only.
    """
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


class BasicBlock(nnx.Module):
    """`relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))`, both kernels 3x3.

    Args:
      in_features: Channels in.
      width: Channels of both convolutions.
      stride: Step of `conv1`.
      make_norm: Builds the normalization of a number of channels.
      rngs: Source of the initial values.
    """

    expansion = 1  # channels out, in widths

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        make_norm: Callable[[int], nnx.Module],
        *,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(in_features, width, 3, stride, rngs=rngs)
        self.norm1 = make_norm(width)
        self.conv2 = _conv(width, width, 3, rngs=rngs)
        self.norm2 = make_norm(width)
        projects = stride != 1 or in_features != width
        self.shortcut = (
            _conv(in_features, width, 1, stride, rngs=rngs) if projects else None
        )
        self.shortcut_norm = make_norm(width) if projects else None

    def __call__(self, inputs: Float[Array, "b x y c"]) -> Float[Array, "b _ _ _"]:
        """Returns the feature maps of the next block."""
        branch = nnx.relu(self.norm1(self.conv1(inputs)))
        branch = self.norm2(self.conv2(branch))
        if self.shortcut is not None:
            inputs = self.shortcut_norm(self.shortcut(inputs))
        return nnx.relu(branch + inputs)


class Bottleneck(nnx.Module):
    """As `BasicBlock` with three convolutions: 1x1, 3x3, and 1x1 to four widths.

    Args:
      in_features: Channels in.
      width: Channels of `conv1` and `conv2`; `conv3` has four times as many.
      stride: Step of `conv2`.
      make_norm: Builds the normalization of a number of channels.
      rngs: Source of the initial values.
    """

    expansion = 4  # channels out, in widths

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        make_norm: Callable[[int], nnx.Module],
        *,
        rngs: nnx.Rngs,
    ):
        out_features = self.expansion * width
        self.conv1 = _conv(in_features, width, 1, rngs=rngs)
        self.norm1 = make_norm(width)
        self.conv2 = _conv(width, width, 3, stride, rngs=rngs)
        self.norm2 = make_norm(width)
        self.conv3 = _conv(width, out_features, 1, rngs=rngs)
        self.norm3 = make_norm(out_features)
        projects = stride != 1 or in_features != out_features
        self.shortcut = (
            _conv(in_features, out_features, 1, stride, rngs=rngs) if projects else None
        )
        self.shortcut_norm = make_norm(out_features) if projects else None

    def __call__(self, inputs: Float[Array, "b x y c"]) -> Float[Array, "b _ _ _"]:
        """Returns the feature maps of the next block."""
        branch = nnx.relu(self.norm1(self.conv1(inputs)))
        branch = nnx.relu(self.norm2(self.conv2(branch)))
        branch = self.norm3(self.conv3(branch))
        if self.shortcut is not None:
            inputs = self.shortcut_norm(self.shortcut(inputs))
        return nnx.relu(branch + inputs)


# By depth: the block, the width of each stage, the blocks of each stage.
DEPTHS: dict[int, tuple[type[nnx.Module], tuple[int, ...], tuple[int, ...]]] = {
    8: (BasicBlock, (16, 32, 64), (1, 1, 1)),
    18: (BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2)),
    20: (BasicBlock, (16, 32, 64), (3, 3, 3)),
    32: (BasicBlock, (16, 32, 64), (5, 5, 5)),
    50: (Bottleneck, (64, 128, 256, 512), (3, 4, 6, 3)),
    56: (BasicBlock, (16, 32, 64), (9, 9, 9)),
}


class ResNet(nnx.Module):
    """`stem`, `stem_norm`, `blocks/0`, `blocks/1`, ...; global average pooling; `head`.

    The first block of every stage but the first halves both sides, rounding up, so
    images of any size will do.

    Args:
      in_features: Channels of the images.
      num_classes: Number of logits.
      depth: 8, 18, 20, 32, 50 or 56.
      stem: "3x3", or "7x7" with stride 2 and then a 3x3 max pool with stride 2.
      norm: "batch", or "group", which holds no batch statistics.
      groups: Groups of each group normalization, or its channels if they are fewer.
      width_multiplier: Factor of all widths; 2 for ResNet32x2 (Khodak et al., 2021).
      rngs: Source of the initial values.

    Raises:
      ValueError: An unknown depth, stem or norm, groups that do not divide a width,
        or a multiplier that gives widths that are not whole.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        depth: int,
        stem: str,
        norm: str,
        groups: int,
        width_multiplier: float,
        rngs: nnx.Rngs,
    ):
        if depth not in DEPTHS:
            raise UserError(
                f"resnet: depth must be one of {list(DEPTHS)}, got {depth!r}. Choose "
                "one of them."
            )
        block, widths, sizes = DEPTHS[depth]
        widths = [width * width_multiplier for width in widths]
        outputs = [width * block.expansion for width in widths]
        errors = norms.problems(
            "resnet", norm, groups, widths + outputs, width_multiplier
        )
        if stem not in STEMS:
            errors.append(
                f"resnet: stem must be one of {STEMS}, got {stem!r}. Choose one of "
                "them."
            )
        if errors:
            raise UserError("\n".join(errors))
        widths = [int(width) for width in widths]
        make_norm = functools.partial(
            norms.make_norm, norm=norm, groups=groups, rngs=rngs
        )
        size, stride = (3, 1) if stem == "3x3" else (7, 2)
        self.stem = _conv(in_features, widths[0], size, stride, rngs=rngs)
        self.stem_norm = make_norm(widths[0])
        self.max_pool = stem == "7x7"
        self.blocks = nnx.List([])
        in_features = widths[0]
        for stage, (width, blocks) in enumerate(zip(widths, sizes, strict=True)):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(
                    block(in_features, width, stride, make_norm, rngs=rngs)
                )
                in_features = block.expansion * width
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        features = nnx.relu(self.stem_norm(self.stem(images)))
        if self.max_pool:
            features = nnx.max_pool(
                features, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
            )
        for block in self.blocks:
            features = block(features)
        return self.head(features.mean(axis=(1, 2))).astype(jnp.float32)


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    depth: int = 18,
    stem: str = "3x3",
    norm: str = "batch",
    groups: int = 32,
    width_multiplier: float = 1,
) -> ResNet:
    """Builds a `ResNet` for images of shape `image_shape` (x, y, c)."""
    return ResNet(
        image_shape[-1],
        num_classes,
        depth=depth,
        stem=stem,
        norm=norm,
        groups=groups,
        width_multiplier=width_multiplier,
        rngs=rngs,
    )
