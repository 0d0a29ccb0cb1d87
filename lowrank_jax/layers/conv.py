"""Low-rank `nnx.Conv` and `nnx.ConvTranspose`, in the four schemes of `folds`."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import folds
from lowrank_jax.cost import LayerCost, merged_is_cheaper
from lowrank_jax.errors import UserError
from lowrank_jax.folds import ConvFold
from lowrank_jax.layers.base import LowRankLayer, hidden_sharding


class ConvolutionLayer(LowRankLayer):
    """A convolution as two, with `rank` channels (for each group) in between."""

    fold_options = frozenset({"scheme"})
    window: ClassVar[tuple[str, ...]]
    """Its window attributes that are one number for each spatial axis."""

    fold: ConvFold

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: ConvFold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        positions = cls._positions(fold, inputs.shape, outputs.shape)
        return LayerCost(fold.input_size, fold.output_size, fold.groups, *positions)

    @staticmethod
    def _positions(
        fold: ConvFold, inputs: Sequence[int], outputs: Sequence[int]
    ) -> tuple[int, int, int]:
        """Returns over how many positions of the batch the dense, the first and the
        second convolution multiply by their kernels."""
        raise NotImplementedError

    def __call__(
        self, inputs: Float[Array, "*b c"], out_sharding: Any = None
    ) -> Float[Array, "*b f"]:
        factors, fold = self.factors, self.fold
        dense_kernel = jax.ShapeDtypeStruct(self.kernel_shape, factors.u.dtype)
        outputs = jax.eval_shape(
            lambda x, k: self._dense_call(x, kernel=k, out_sharding=out_sharding),
            inputs,
            dense_kernel,
        )
        if factors.max_rank == 0:  # XLA has no convolution without channels
            bias = jnp.zeros(1) if self.bias is None else self.bias[...]
            bias = bias.reshape((1,) * (len(outputs.shape) - 1) + bias.shape)
            return jnp.broadcast_to(bias, outputs.shape).astype(outputs.dtype)
        dense, first, second = self._positions(fold, inputs.shape, outputs.shape)
        merged = merged_is_cheaper(
            factors.in_size, factors.out_size, factors.max_rank, first, second, dense
        )
        if merged and not factors.per_example:
            kernel = self.merged_kernel(self.dtype)
            return self._dense_call(inputs, kernel=kernel, out_sharding=out_sharding)
        hidden = self._first_call(
            inputs,
            kernel=fold.first_kernel(factors.active_u(self.dtype)),
            out_sharding=hidden_sharding(out_sharding, inputs.ndim),
            **self._axes_of(fold.first_axes),
            in_features=self.in_features,
            out_features=fold.groups * factors.max_rank,
        )
        return self._dense_call(
            self._mask_hidden(hidden),
            kernel=fold.second_kernel(factors.active_v(self.dtype)),
            out_sharding=out_sharding,
            **self._axes_of(fold.second_axes),
            in_features=fold.groups * factors.max_rank,
            out_features=self.out_features,
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
            "padding": padding if isinstance(padding, str) else own(padding, 0),
            **{name: own(getattr(self, name) or 1, 1) for name in self.window},
        }

    def _mask_hidden(self, hidden: Float[Array, "*b gr"]) -> Float[Array, "*b gr"]:
        """Applies ranks per example, which a stack of groups keeps as its first
        axis."""
        if self.factors.per_example and hidden.ndim == len(self.kernel_size) + 1:
            raise UserError(
                "rank: one rank per example needs a batch axis, got one image, hidden"
                f" shape {hidden.shape}. Add the axis, or set one rank."
            )
        if self.fold.groups == 1 or not self.factors.per_example:
            return self.factors.mask_hidden(hidden)
        grouped = hidden.reshape(*hidden.shape[:-1], self.fold.groups, -1)
        masked = self.factors.mask_hidden(jnp.moveaxis(grouped, -2, 0))
        return jnp.moveaxis(masked, 0, -2).reshape(hidden.shape)


class LowRankConv(ConvolutionLayer):
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
    window = ("strides", "input_dilation", "kernel_dilation")

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
        _check_no_mask(cls, dense)
        return folds.conv_fold(
            dense.kernel_size,
            dense.in_features,
            dense.out_features,
            groups=dense.feature_group_count,
            scheme=scheme,
        )

    @staticmethod
    def _positions(
        fold: ConvFold, inputs: Sequence[int], outputs: Sequence[int]
    ) -> tuple[int, int, int]:
        _, between, columns = _sizes(fold, inputs, outputs)
        return columns, between, columns

    def _axes_of(self, axes: Sequence[int]) -> dict[str, Any]:
        own = super()._axes_of(axes)
        if self.conv_general_dilated is jax.lax.conv_general_dilated:
            own["conv_general_dilated"] = convolve
        return own


class LowRankConvTranspose(ConvolutionLayer):
    """`nnx.ConvTranspose` with a factored kernel: two transposed convolutions.

    As `LowRankConv`, over inputs with zeros between them: each of the two spreads its
    own spatial axes. Multiplications by these zeros are not counted: a kernel costs its
    size at each position of *its input*.

    Args:
      in_features: As in `nnx.ConvTranspose`.
      out_features: As in `nnx.ConvTranspose`.
      kernel_size: As in `nnx.ConvTranspose`.
      strides: As in `nnx.ConvTranspose`.
      max_rank: Rank to allocate, full by default.
      scheme: How the kernel folds into a matrix, 0 to 3 (`folds.conv_fold`); 3 mixes
        channels before they are spread, which is the cheaper order for large strides.
      rngs: Source of keys.
      **options: The further arguments of `nnx.ConvTranspose`, but for `mask`.

    >>> layer = LowRankConvTranspose(8, 3, (4, 4), 2, max_rank=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 6, 6, 8))).shape
    (2, 12, 12, 3)
    """

    dense_type = nnx.ConvTranspose
    window = ("strides", "kernel_dilation")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        max_rank: int | None = None,
        scheme: int = 0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dense = nnx.ConvTranspose(
            in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        self._adopt(dense, max_rank=max_rank, scheme=scheme)

    @classmethod
    def fold_of(cls, dense: nnx.ConvTranspose, *, scheme: int = 0) -> ConvFold:
        _check_no_mask(cls, dense)
        return folds.conv_fold(
            dense.kernel_size,
            dense.in_features,
            dense.out_features,
            scheme=scheme,
            transposed=dense.transpose_kernel,
        )

    @staticmethod
    def _positions(
        fold: ConvFold, inputs: Sequence[int], outputs: Sequence[int]
    ) -> tuple[int, int, int]:
        rows, between, _ = _sizes(fold, inputs, outputs)
        return rows, rows, between


def convolve(
    inputs: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    out_sharding: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "b *t f"]:
    """Returns `lax.conv_general_dilated`, channels last, as a product of matrices where
    the kernel has one place.

    Its gradient by that kernel takes a tenth of the time on CPUs.
    """
    one_place = math.prod(kernel.shape[:-2]) == 1 and feature_group_count == 1
    moved = not isinstance(padding, str) and any(any(pair) for pair in padding)
    if one_place and not moved and {*strides, *(lhs_dilation or ())} == {1}:
        return jax.lax.dot_general(
            inputs,
            kernel.reshape(kernel.shape[-2:]),
            (((inputs.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    return jax.lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        out_sharding=out_sharding,
        precision=precision,
        preferred_element_type=preferred_element_type,
        feature_group_count=feature_group_count,
        **options,
    )


def _check_no_mask(
    cls: type[ConvolutionLayer], dense: nnx.Conv | nnx.ConvTranspose
) -> None:
    if dense.mask is not None:
        raise UserError(
            f"{cls.__name__}: a masked kernel is not a product of low rank, got a"
            f" {type(dense).__name__} with a mask. Keep it dense in the rules."
        )


def _sizes(
    fold: ConvFold, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, int, int]:
    """Returns the positions, over the batch, of the input, between the two
    convolutions and of the output."""
    spatial = len(fold.kernel_shape) - 2
    rows, columns = inputs[-spatial - 1 : -1], outputs[-spatial - 1 : -1]
    batch = math.prod(outputs[: -spatial - 1])
    between = [
        columns[axis] if axis in fold.first_axes else rows[axis]
        for axis in range(spatial)
    ]
    before, middle, after = map(math.prod, (rows, between, columns))
    return batch * before, batch * middle, batch * after
