"""How the layers of a model compute in a training step.

In the precision that the config asks for, and on CPUs in forms whose gradients are
fast. Parameters, gradients and the optimizer's state stay float32, and so do
normalization, the logits and the loss: layers that multiply by a matrix cast it and
their inputs. Evaluation is float32.
"""

import jax.numpy as jnp
from flax import nnx

from lowrank_jax.layers.base import LowRankLayer
from lowrank_jax.paths import walk
from train import convolution, products

DTYPES = ("float32", "bfloat16")
_MULTIPLY = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Embed,
    LowRankLayer,
)


def prepare(model: nnx.Module, dtype: str, *, one_device: bool) -> None:
    """Sets how a model's layers compute, in place.

    Args:
      model: The model of a step.
      dtype: Of products, one of `DTYPES`; a layer that has a dtype of its own keeps it.
      one_device: Whether it is not split over a mesh, where XLA's own forms are left.
    """
    if one_device:
        convolution.use_in(model)
        products.use_in(model)
    if dtype == "float32":
        return
    for _, node in walk(model):
        if isinstance(node, _MULTIPLY) and node.dtype is None:
            node.dtype = jnp.dtype(dtype)
