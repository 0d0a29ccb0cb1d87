"""Low-rank twins of Flax's layers; `LAYERS` is the table that surgery works from."""

from flax import nnx

from lowrank_jax.layers.base import LowRankLayer
from lowrank_jax.layers.conv import LowRankConv
from lowrank_jax.layers.einsum import LowRankEinsum
from lowrank_jax.layers.embed import LowRankEmbed
from lowrank_jax.layers.linear import LowRankLinear, LowRankLinearGeneral

LAYERS: dict[type[nnx.Module], type[LowRankLayer]] = {
    layer.dense_type: layer
    for layer in (
        LowRankLinear,
        LowRankLinearGeneral,
        LowRankConv,
        LowRankEinsum,
        LowRankEmbed,
    )
}
"""The low-rank layer of each dense type; a new layer is one more row."""

__all__ = [
    "LAYERS",
    "LowRankConv",
    "LowRankEinsum",
    "LowRankEmbed",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankLinearGeneral",
]
