"""Low-rank `nnx.Embed`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import folds
from lowrank_jax.cost import LayerCost, merged_is_cheaper
from lowrank_jax.folds import Fold
from lowrank_jax.layers.base import LowRankLayer, hidden_sharding


class LowRankEmbed(LowRankLayer):
    """`nnx.Embed` with a factored table: row `n` is `u[n] v`; `attend` is its
    transpose.

    Args:
      num_embeddings: As in `nnx.Embed`.
      features: As in `nnx.Embed`.
      max_rank: Rank to allocate, full by default.
      rngs: Source of keys.
      **options: The further arguments of `nnx.Embed`.
    """

    dense_type = nnx.Embed
    kernel_name = "embedding"

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        max_rank: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.Embed(num_embeddings, features, rngs=rngs, **options)
        self._adopt(dense, max_rank=max_rank)

    @classmethod
    def fold_of(cls, dense: nnx.Embed) -> Fold:
        return folds.linear_fold(dense.num_embeddings, dense.features)

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        """Looking a row up costs nothing, multiplying it by `v` does; `attend` is a
        product."""
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            return LayerCost(fold.input_size, fold.output_size, 1, 0, 0, inputs.size)
        rows = math.prod(inputs.shape[:-1])
        return LayerCost(fold.input_size, fold.output_size, 1, rows, rows, rows)

    def __call__(
        self, inputs: Int[Array, "*b"], out_sharding: Any = None
    ) -> Float[Array, "*b o"]:
        factors = self.factors
        if self._merges(first=0, second=inputs.size, dense=0):
            table = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, embedding=table, out_sharding=out_sharding)
        hidden = self._dense_call(
            inputs,
            embedding=factors.active_u(self.dtype),
            features=factors.max_rank,
            out_sharding=hidden_sharding(out_sharding, inputs.ndim + 1),
        )
        return jnp.dot(
            factors.mask_hidden(hidden),
            factors.active_v(self.dtype),
            out_sharding=out_sharding,
        )

    def attend(
        self, query: Float[Array, "*b o"], out_sharding: Any = None
    ) -> Float[Array, "*b i"]:
        """Logits over the table, as in `nnx.Embed.attend`: `(query v^T) u^T`."""
        factors = self.factors
        rows = math.prod(query.shape[:-1])
        if self._merges(first=rows, second=rows, dense=rows):
            query, table = self.promote_dtype(
                (query, self.merged_kernel(self.dtype)), dtype=self.dtype
            )
            return jnp.dot(query, table.T, out_sharding=out_sharding)
        query, u, v = self.promote_dtype(
            (query, factors.active_u(self.dtype), factors.active_v(self.dtype)),
            dtype=self.dtype,
        )
        sharding = hidden_sharding(out_sharding, query.ndim)
        hidden = factors.mask_hidden(jnp.dot(query, v.T, out_sharding=sharding))
        return jnp.dot(hidden, u.T, out_sharding=out_sharding)

    def _merges(self, *, first: int, second: int, dense: int) -> bool:
        factors = self.factors
        return not factors.per_example and merged_is_cheaper(
            factors.in_size, factors.out_size, factors.max_rank, first, second, dense
        )
