"""Low-rank `nnx.Einsum`."""

import re
import string
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import folds, placement
from lowrank_jax.errors import UserError
from lowrank_jax.folds import Fold
from lowrank_jax.layers.base import like_sharding
from lowrank_jax.layers.linear import ProductLayer


class LowRankEinsum(ProductLayer):
    """`nnx.Einsum` with a factored kernel.

    Kernel axes that the input shares and the output drops are the rows of the matrix,
    those new in the output its columns; axes that all three share hold one matrix each.

    Args:
      einsum_str: As in `nnx.Einsum`, and needed here: it says what the matrix is.
      kernel_shape: As in `nnx.Einsum`.
      bias_shape: As in `nnx.Einsum`.
      max_rank: Rank to allocate, full by default.
      rngs: Source of keys.
      **options: The further arguments of `nnx.Einsum`.
    """

    dense_type = nnx.Einsum

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        max_rank: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.Einsum(einsum_str, kernel_shape, bias_shape, rngs=rngs, **options)
        self._adopt(dense, max_rank=max_rank)

    @classmethod
    def fold_of(cls, dense: nnx.Einsum) -> Fold:
        return folds.einsum_fold(dense.einsum_str, dense.kernel_shape)

    def __call__(
        self,
        inputs: Float[Array, "..."],
        einsum_str: str | None = None,
        out_sharding: Any = None,
    ) -> Float[Array, "..."]:
        if einsum_str is not None:
            raise UserError(
                "LowRankEinsum: the equation is fixed when the layer is made, got"
                f" {einsum_str!r} in the call. Keep this layer dense in the rules."
            )
        if self._merges(inputs):
            kernel = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, kernel=kernel, out_sharding=out_sharding)
        factors, fold = self.factors, self.fold
        rank, stack = factors.max_rank, fold.stack_shape
        u, v = factors.active_u(self.dtype), factors.active_v(self.dtype)
        u = placement.reshape(u, *stack, *fold.input_shape, rank)
        v = placement.reshape(v, *stack, rank, *fold.output_shape)
        first, second = self._equations()
        ndim = inputs.ndim - len(fold.input_shape) + 1
        hidden = self._first_call(
            inputs,
            einsum_str=first,
            kernel=u,
            out_sharding=_hidden_sharding(out_sharding, second, ndim),
        )
        hidden = factors.mask_hidden(hidden)
        return self._dense_call(
            hidden,
            einsum_str=second,
            kernel=v,
            kernel_shape=v.shape,
            out_sharding=out_sharding,
        )

    def _equations(self) -> tuple[str, str]:
        """The two einsums that apply `u`, then `v`; stack axes come first in
        between."""
        operands, outputs = self.einsum_str.split("->")
        inputs, kernel = operands.split(",")
        stack, rows, columns = (
            "".join(kernel[axis] for axis in axes)
            for axes in (
                self.fold.stack_axes,
                self.fold.input_axes,
                self.fold.output_axes,
            )
        )
        rank = next(x for x in string.ascii_letters if x not in self.einsum_str)
        kept = "".join(x for x in inputs if x not in stack + rows)
        hidden = stack + kept + rank
        return (
            f"{inputs},{stack}{rows}{rank}->{hidden}",
            f"{hidden},{stack}{rank}{columns}->{outputs}",
        )


def _hidden_sharding(out_sharding: Any, second: str, ndim: int) -> Any:
    """Returns the sharding of the first operand, of `ndim` axes, of an equation for
    that of its result: what both have is split alike, the rest is whole."""
    if out_sharding is None:
        return None
    hidden, _, outputs = re.split(",|->", second.replace(" ", ""))
    between = string.digits[: ndim - sum(map(str.isalpha, hidden))]
    hidden, outputs = (x.replace("...", between) for x in (hidden, outputs))
    spec = getattr(out_sharding, "spec", out_sharding)
    axes = dict(zip(outputs, spec, strict=False))
    return like_sharding(out_sharding, *(axes.get(axis) for axis in hidden))
