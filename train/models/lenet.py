"""LeNet-5 (LeCun et al., 1998) in its usual modern form: relu and max pooling.

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from lowrank_jax.errors import UserError
from train.models.pooling import max_pool_2x2

# The smallest side that leaves one pixel: 16 -> 12 -> 6 -> 2 -> 1.
MIN_SIDE = 16


class LeNet(nnx.Module):
    """Two convolutions, three linear layers; 44,426 parameters at 28x28x1, 10 classes.

    Args:
      image_shape: Shape (x, y, c) of one image.
      num_classes: Number of logits.
      rngs: Source of the initial values.

    Raises:
      ValueError: A side of the image is shorter than 16 pixels.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        x, y, channels = image_shape
        if min(x, y) < MIN_SIDE:
            raise UserError(
                f"lenet: image_shape must be at least {MIN_SIDE}x{MIN_SIDE} pixels, "
                f"got {x}x{y}. Pad the images or use another model."
            )
        self.conv1 = nnx.Conv(channels, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        x, y = (((side - 4) // 2 - 4) // 2 for side in (x, y))
        self.fc1 = nnx.Linear(x * y * 16, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        features = nnx.relu(max_pool_2x2(self.conv1(images)))
        features = nnx.relu(max_pool_2x2(self.conv2(features)))
        features = features.reshape(features.shape[0], -1)
        features = nnx.relu(self.fc1(features))
        features = nnx.relu(self.fc2(features))
        return self.fc3(features).astype(jnp.float32)


def build(
    *, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs
) -> LeNet:
    """Builds a `LeNet` for images of shape `image_shape` (x, y, c)."""
    return LeNet(image_shape, num_classes, rngs=rngs)
