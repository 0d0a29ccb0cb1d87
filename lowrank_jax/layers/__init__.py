"""Low-rank twins of Flax's layers; `LAYERS` is the table that surgery works from."""

from lowrank_jax.layers.base import LowRankLayer
from lowrank_jax.layers.conv import LowRankConv, LowRankConvTranspose
from lowrank_jax.layers.einsum import LowRankEinsum
from lowrank_jax.layers.embed import LowRankEmbed
from lowrank_jax.layers.linear import LowRankLinear, LowRankLinearGeneral
from lowrank_jax.layers.param import LowRankParam
from lowrank_jax.layers.table import LAYERS, low_rank_type, register, twin_type

__all__ = [
    "LAYERS",
    "LowRankConv",
    "LowRankConvTranspose",
    "LowRankEinsum",
    "LowRankEmbed",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankLinearGeneral",
    "LowRankParam",
    "low_rank_type",
    "twin_type",
    "register",
]
