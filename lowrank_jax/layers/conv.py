"""Low-rank `nnx.Conv`, in the four schemes of `folds`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import folds
from lowrank_jax.cost import LayerCost, merged_is_cheaper
from lowrank_jax.errors import UserError
from lowrank_jax.folds import ConvFold
from lowrank_jax.layers.base import LowRankLayer


class LowRankConv(LowRankLayer):
    """`nnx.Conv` with a factored kernel: two convolutions with `rank` channels between.

    Each of the two takes the kernel size, stride, padding and dilation of its own
    spatial axes. A grouped convolution has one matrix per group.

    Args:
      in_features: As in `nnx.Conv`.
      out_features: As in `nnx.Conv`.
      kernel_size: As in `nnx.Conv`.
      strides: As in `nnx.Conv`.
      max_rank: Rank to allocate (for each group), full by default.
      scheme: How the kernel folds into a matrix, 0 to 3 (`folds.conv_fold`).
      rngs: Source of keys.
      **options: The further arguments of `nnx.Conv`, but for `mask`.

    >>> layer = LowRankConv(3, 8, (3, 3), max_rank=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 6, 6, 3))).shape
    (2, 6, 6, 8)
    """

    dense_type = nnx.Conv
    fold: ConvFold

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        max_rank: int | None = None,
        scheme: int = 0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.Conv(
            in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        self._adopt(dense, max_rank=max_rank, scheme=scheme)

    @classmethod
    def fold_of(cls, dense: nnx.Conv, *, scheme: int = 0) -> ConvFold:
        if dense.mask is not None:
            raise UserError(
                "LowRankConv: a masked kernel is not a product of low rank, got a conv"
                " with a mask. Keep it dense in the rules."
            )
        return folds.conv_fold(
            dense.kernel_size,
            dense.in_features,
            dense.out_features,
            groups=dense.feature_group_count,
            scheme=scheme,
        )

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: ConvFold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        first, second = _positions(fold, inputs.shape, outputs.shape)
        return LayerCost(
            fold.input_size, fold.output_size, fold.groups, second, first, second
        )

    def __call__(
        self, inputs: Float[Array, "*b c"], out_sharding: Any = None
    ) -> Float[Array, "*b f"]:
        factors, fold = self.factors, self.fold
        kernel = jax.ShapeDtypeStruct(self.kernel_shape, factors.u.dtype)
        outputs = jax.eval_shape(
            lambda x, k: self._dense_call(x, kernel=k), inputs, kernel
        )
        if factors.max_rank == 0:  # XLA has no convolution without channels
            bias = jnp.zeros(1) if self.bias is None else self.bias[...]
            bias = bias.reshape((1,) * (len(outputs.shape) - 1) + bias.shape)
            return jnp.broadcast_to(bias, outputs.shape).astype(outputs.dtype)
        first, second = _positions(fold, inputs.shape, outputs.shape)
        merged = merged_is_cheaper(
            factors.in_size, factors.out_size, factors.max_rank, first, second, second
        )
        if merged and not factors.per_example:
            kernel = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, kernel=kernel, out_sharding=out_sharding)
        hidden = self._first_call(
            inputs,
            kernel=fold.first_kernel(factors.active_u(self.dtype)),
            **self._axes_of(fold.first_axes),
            **self._channels(self.in_features, fold.groups * factors.max_rank),
        )
        return self._dense_call(
            self._mask_hidden(hidden),
            kernel=fold.second_kernel(factors.active_v(self.dtype)),
            out_sharding=out_sharding,
            **self._axes_of(fold.second_axes),
            **self._channels(fold.groups * factors.max_rank, self.out_features),
        )

    def _axes_of(self, axes: Sequence[int]) -> dict[str, Any]:
        """Window attributes of a convolution that handles only these spatial axes."""
        spatial = len(self.kernel_size)

        def own(value: Any, neutral: Any) -> tuple[Any, ...]:
            values = [value] * spatial if isinstance(value, int) else list(value)
            return tuple(
                values[axis] if axis in axes else neutral for axis in range(spatial)
            )

        padding = self.padding
        return {
            "kernel_size": own(self.kernel_size, 1),
            "strides": own(self.strides or 1, 1),
            "input_dilation": own(self.input_dilation or 1, 1),
            "kernel_dilation": own(self.kernel_dilation or 1, 1),
            "padding": padding if isinstance(padding, str) else own(padding, 0),
        }

    def _channels(self, in_features: int, out_features: int) -> dict[str, Any]:
        return {"in_features": in_features, "out_features": out_features}

    def _mask_hidden(self, hidden: Float[Array, "*b gr"]) -> Float[Array, "*b gr"]:
        """Applies ranks per example, which a stack of groups keeps as its first
        axis."""
        if self.factors.per_example and hidden.ndim == len(self.kernel_size) + 1:
            raise UserError(
                "rank: one rank per example needs a batch axis, got one image, hidden"
                f" shape {hidden.shape}. Add the axis, or set one rank."
            )
        if self.fold.groups == 1:
            return self.factors.mask_hidden(hidden)
        grouped = hidden.reshape(*hidden.shape[:-1], self.fold.groups, -1)
        masked = self.factors.mask_hidden(jnp.moveaxis(grouped, -2, 0))
        return jnp.moveaxis(masked, 0, -2).reshape(hidden.shape)


def _positions(
    fold: ConvFold, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, int]:
    """How many positions (over the batch) the first and second convolution compute."""
    spatial = len(fold.kernel_shape) - 2
    rows, columns = inputs[-spatial - 1 : -1], outputs[-spatial - 1 : -1]
    batch = math.prod(outputs[: -spatial - 1])
    between = [
        columns[axis] if axis in fold.first_axes else rows[axis]
        for axis in range(spatial)
    ]
    return batch * math.prod(between), batch * math.prod(columns)
