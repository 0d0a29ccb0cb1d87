"""The table of low-rank layers that factorization works from, and how to add a row."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from lowrank_jax.errors import UserError
from lowrank_jax.layers.base import LowRankLayer
from lowrank_jax.layers.conv import LowRankConv, LowRankConvTranspose
from lowrank_jax.layers.einsum import LowRankEinsum
from lowrank_jax.layers.embed import LowRankEmbed
from lowrank_jax.layers.linear import LowRankLinear, LowRankLinearGeneral
from lowrank_jax.layers.own import own_forward, subclass_of

LAYERS: dict[type[nnx.Module], type[LowRankLayer]] = {
    layer.dense_type: layer
    for layer in (
        LowRankLinear,
        LowRankLinearGeneral,
        LowRankConv,
        LowRankConvTranspose,
        LowRankEinsum,
        LowRankEmbed,
    )
}
"""The low-rank layer of each dense type; a new layer is one more row (`register`)."""


def register(
    dense_type: type[nnx.Module],
    low_rank: type[LowRankLayer] | None = None,
    *,
    kernel: str = "kernel",
    inputs: Sequence[int] = (0,),
    outputs: Sequence[int] = (1,),
    stack: Sequence[int] = (),
) -> type[LowRankLayer]:
    """Adds a layer class of one's own to the table.

    Args:
      dense_type: The class; its subclasses are known with it.
      low_rank: Its low-rank layer. None for one that runs the class's own code, with
        the Param `kernel` merged where it is read.
      kernel: Name of the Param that holds the matrix.
      inputs: Axes of the Param that are the rows of the matrix.
      outputs: Axes that are its columns.
      stack: Axes with one matrix each.

    Returns:
      The low-rank type.

    Raises:
      UserError: The class is in the table already, is no NNX module, or the axes are
        not those of a kernel.

    >>> class Dense(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.weight = nnx.Param(rngs.params.normal((3, 4)))
    ...     def __call__(self, inputs):
    ...         return inputs @ self.weight.T
    >>> register(Dense, kernel="weight", inputs=(1,), outputs=(0,)).__name__
    'LowRankDense'
    """
    if not (isinstance(dense_type, type) and issubclass(dense_type, nnx.Module)):
        raise UserError(
            f"register: must be given a class of NNX modules, got {dense_type!r}."
            " Derive it from nnx.Module."
        )
    if dense_type in LAYERS:
        raise UserError(
            f"register: {dense_type.__name__} must not be in the table yet, got it"
            f" again; it stands for {LAYERS[dense_type].__name__}. Register it once."
        )
    if low_rank is None:
        low_rank = own_forward(dense_type, kernel, inputs, outputs, stack)
    LAYERS[dense_type] = low_rank
    return low_rank


def low_rank_type(dense_type: type[nnx.Module]) -> type[LowRankLayer] | None:
    """Returns the low-rank layer for a class, None where there is none.

    Of a subclass of a known class it is a subclass of both; it multiplies by the
    factors where the subclass leaves the forward as it is, and else runs the
    subclass's own code on the merged kernel.
    """
    if issubclass(dense_type, LowRankLayer):
        return None
    for base in dense_type.__mro__:
        if base in LAYERS:
            low_rank = LAYERS[base]
            return low_rank if base is dense_type else subclass_of(low_rank, dense_type)
    return None


def twin_type(layer: Any) -> type[LowRankLayer]:
    """Returns the low-rank type of a dense layer that has one, as `find_layers` finds
    them."""
    kind = low_rank_type(type(layer))
    assert kind is not None, type(layer)
    return kind
