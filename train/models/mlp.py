"""Multi-layer perceptron on flattened images.

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from train.models.sizes import check_sizes


class MLP(nnx.Module):
    """Linear layers with relu between them: `hidden/0`, `hidden/1`, ..., `head`.

    Args:
      in_features: Pixels times channels of one image.
      hidden: Width of each hidden layer; empty for a linear classifier.
      num_classes: Number of logits.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes("mlp", hidden=hidden, num_classes=num_classes)
        self.hidden = nnx.List([])
        for width in hidden:
            self.hidden.append(nnx.Linear(in_features, width, rngs=rngs))
            in_features = width
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        features = images.reshape(images.shape[0], -1)
        for layer in self.hidden:
            features = nnx.relu(layer(features))
        return self.head(features).astype(jnp.float32)


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    hidden: Sequence[int] = (256, 256),
) -> MLP:
    """Builds an `MLP` for images of shape `image_shape` (x, y, c)."""
    return MLP(math.prod(image_shape), hidden, num_classes, rngs=rngs)
