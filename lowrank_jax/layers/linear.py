"""Low-rank `nnx.Linear` and `nnx.LinearGeneral`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import folds, placement
from lowrank_jax.cost import LayerCost, merged_is_cheaper
from lowrank_jax.folds import Fold
from lowrank_jax.layers.base import LowRankLayer, hidden_sharding


class ProductLayer(LowRankLayer):
    """A layer whose input is rows, each of which every factor multiplies once.

    Attributes:
      hidden_product: What computes `x u` in the place of the dense layer's own
        `dot_general`, where it is set.
    """

    hidden_product: Callable[..., Array] | None = None

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        rows = _rows_per_matrix(inputs, fold)
        matrices = math.prod(fold.stack_shape)
        return LayerCost(fold.input_size, fold.output_size, matrices, rows, rows, rows)

    def _hidden_call(self, inputs: Array, **attributes: Any) -> Array:
        """Multiplies by the first factor."""
        if self.hidden_product is not None:
            attributes["dot_general"] = self.hidden_product
        return self._first_call(inputs, **attributes)

    def _merges(self, inputs: Array) -> bool:
        """Whether the merged order is the cheaper one for this many rows."""
        rows = _rows_per_matrix(inputs, self.fold)
        factors = self.factors
        return not factors.per_example and merged_is_cheaper(
            factors.in_size, factors.out_size, factors.max_rank, rows, rows, rows
        )


def _rows_per_matrix(inputs: Array | jax.ShapeDtypeStruct, fold: Fold) -> int:
    return inputs.size // (math.prod(fold.stack_shape) * fold.input_size)


class LowRankLinear(ProductLayer):
    """`nnx.Linear` with a factored kernel: `y = (x u) v + bias`.

    The order of the products is the cheaper one for the number of rows.

    Args:
      in_features: As in `nnx.Linear`.
      out_features: As in `nnx.Linear`.
      max_rank: Rank to allocate, min(in_features, out_features) by default.
      rngs: Source of keys; the dense kernel is drawn, then split by a balanced SVD.
      **options: The further arguments of `nnx.Linear`.

    >>> layer = LowRankLinear(8, 4, max_rank=2, rngs=nnx.Rngs(0))
    >>> layer(jax.numpy.ones((3, 8))).shape
    (3, 4)
    """

    dense_type = nnx.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        max_rank: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.Linear(in_features, out_features, rngs=rngs, **options)
        self._adopt(dense, max_rank=max_rank)

    @classmethod
    def fold_of(cls, dense: nnx.Linear) -> Fold:
        return folds.linear_fold(dense.in_features, dense.out_features)

    def __call__(
        self, inputs: Float[Array, "*b i"], out_sharding: Any = None
    ) -> Float[Array, "*b o"]:
        if self._merges(inputs):
            kernel = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, kernel=kernel, out_sharding=out_sharding)
        factors = self.factors
        hidden = self._hidden_call(
            inputs,
            kernel=factors.active_u(self.dtype),
            out_sharding=hidden_sharding(out_sharding, inputs.ndim),
        )
        hidden = factors.mask_hidden(hidden)

        def multiply(hidden: Array, kernel: Array) -> Array:
            return self._first_call(hidden, kernel=kernel, out_sharding=out_sharding)

        outputs = factors.expand(hidden, multiply, self.dtype)
        if self.bias is None:
            return outputs
        bias = self.bias[...].astype(outputs.dtype)
        return outputs + bias.reshape(*[1] * (outputs.ndim - 1), -1)

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        cost = super().cost_of(layer, fold, inputs, outputs)
        return dataclasses.replace(cost, spared_positions=cost.second_positions)

    def _merges(self, inputs: Array) -> bool:
        """Without its identity the gauge form is never dearer than a dense one."""
        return not self.factors.skips_identity and super()._merges(inputs)


class LowRankLinearGeneral(ProductLayer):
    """`nnx.LinearGeneral` with a factored kernel; batch axes hold one matrix each.

    The contracted axes together are the rows of the matrix, the new ones its columns:
    an attention projection is one matrix over all heads.

    Args:
      in_features: As in `nnx.LinearGeneral`.
      out_features: As in `nnx.LinearGeneral`.
      max_rank: Rank to allocate, full by default.
      rngs: Source of keys.
      **options: The further arguments of `nnx.LinearGeneral`.
    """

    dense_type = nnx.LinearGeneral

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        max_rank: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.LinearGeneral(in_features, out_features, rngs=rngs, **options)
        self._adopt(dense, max_rank=max_rank)

    @classmethod
    def fold_of(cls, dense: nnx.LinearGeneral) -> Fold:
        batch_shape = tuple(dense.batch_axis.values())
        return folds.general_fold(batch_shape, dense.in_features, dense.out_features)

    def __call__(
        self, inputs: Float[Array, "..."], out_sharding: Any = None
    ) -> Float[Array, "..."]:
        if self._merges(inputs):
            kernel = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, kernel=kernel, out_sharding=out_sharding)
        factors, stack = self.factors, self.fold.stack_shape
        rank, features = factors.max_rank, len(self.out_features)
        u, v = factors.active_u(self.dtype), factors.active_v(self.dtype)
        ndim = inputs.ndim - len(self.in_features) + features
        hidden = self._hidden_call(
            inputs,
            kernel=placement.reshape(u, *stack, *self.in_features, rank),
            out_sharding=hidden_sharding(out_sharding, ndim, features),
        )
        return self._dense_call(  # the first product put the batch axes in front
            factors.mask_hidden(hidden),
            kernel=placement.reshape(v, *stack, rank, *self.out_features),
            axis=(-1,),
            batch_axis=dict(enumerate(stack)),
            out_sharding=out_sharding,
        )
