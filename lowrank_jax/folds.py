"""Folds: how a layer's kernel tensor is read as the matrix that is factored.

A fold sorts the axes of a kernel into stack axes (one matrix for each, such as the
groups of a convolution), input axes (rows of the matrix) and output axes (columns). Any
number of further leading axes, as from modules stacked by `nnx.vmap`, pass through.

Convolutions know four schemes, written for a kernel k1 x k2 from c channels to f
filters (Idelbayev and Carreira-Perpinan, 2020; Yang et al., 2020; Liebenwein et al.,
2021):

| scheme | matrix in this orientation | first convolution | second convolution |
|---|---|---|---|
| 0 channel | (k1 k2 c) x f | k1 x k2, c -> r | 1 x 1, r -> f |
| 1 split columns | (k2 c) x (k1 f) | 1 x k2, c -> r | k1 x 1, r -> f |
| 2 spatial | (k1 c) x (k2 f) | k1 x 1, c -> r | 1 x k2, r -> f |
| 3 decode | c x (k1 k2 f) | 1 x 1, c -> r | k1 x k2, r -> f |
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_jax import placement
from lowrank_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fold:
    """A one-to-one map between a kernel tensor and a stack of matrices.

    Args:
      kernel_shape: Shape of the kernel, leading axes of stacked modules left out.
      view_shape: Shape in which the axes below are counted: the kernel's own, or one
        with an axis split (the filters of a grouped convolution).
      stack_axes: Axes of the view with one matrix each.
      input_axes: Axes that make the rows of the matrix.
      output_axes: Axes that make its columns.
    """

    kernel_shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self._sizes(self.stack_axes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._sizes(self.input_axes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self._sizes(self.output_axes)

    @property
    def input_size(self) -> int:
        return math.prod(self.input_shape)

    @property
    def output_size(self) -> int:
        return math.prod(self.output_shape)

    @property
    def full_rank(self) -> int:
        return min(self.input_size, self.output_size)

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "*stack i o"]:
        """Reads a kernel as matrices `(*leading, *stack, i, o)`.

        A matrix axis made of several of the kernel's is split over a mesh as the first
        of these is (longer than 1), and is whole where that one is: a convolution's
        `k1 k2 c` rows are, whatever its channels are split over.
        """
        lead = kernel.shape[: kernel.ndim - len(self.kernel_shape)]
        if kernel.shape[len(lead) :] != self.kernel_shape:
            raise UserError(
                f"kernel: shape must end in {self.kernel_shape}, got {kernel.shape}."
                " Build the fold from the layer that owns the kernel."
            )
        view = placement.reshape(kernel, *lead, *self.view_shape)
        view = view.transpose(self._order(len(lead)))
        sizes = (*self.stack_shape, self.input_size, self.output_size)
        return placement.reshape(view, *lead, *sizes)

    def to_kernel(self, matrix: Float[Array, "*stack i o"]) -> Float[Array, "..."]:
        """Inverts `to_matrix`; the first axis of several takes over how the matrix's
        is split over a mesh."""
        lead = matrix.shape[: matrix.ndim - 2 - len(self.stack_axes)]
        order = self._order(len(lead))
        sizes = (*self.stack_shape, *self.input_shape, *self.output_shape)
        view = placement.reshape(matrix, *lead, *sizes)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return placement.reshape(view.transpose(inverse), *lead, *self.kernel_shape)

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.view_shape[axis] for axis in axes)

    def _order(self, lead: int) -> list[int]:
        axes = (*self.stack_axes, *self.input_axes, *self.output_axes)
        return [*range(lead), *(lead + axis for axis in axes)]


def linear_fold(in_features: int, out_features: int) -> Fold:
    """Makes the fold of a kernel that is a matrix already."""
    return general_fold((), (in_features,), (out_features,))


def general_fold(
    batch_shape: Sequence[int], in_shape: Sequence[int], out_shape: Sequence[int]
) -> Fold:
    """Makes the fold of `nnx.LinearGeneral`: kernel `(*batch, *in, *out)`."""
    shape = (*batch_shape, *in_shape, *out_shape)
    inputs = len(batch_shape)
    outputs = inputs + len(in_shape)
    return Fold(
        shape,
        shape,
        tuple(range(inputs)),
        tuple(range(inputs, outputs)),
        tuple(range(outputs, len(shape))),
    )


def einsum_fold(einsum_str: str, kernel_shape: Sequence[int]) -> Fold:
    """Makes the fold of a two-operand einsum whose second operand is the kernel.

    Axes of the kernel that the input has and the output has not are inputs, those that
    only the output has are outputs, those that all three have are stack axes.

    >>> einsum_fold("bti,ihd->bthd", (6, 2, 3)).output_shape
    (2, 3)
    """
    operands, result = einsum_str.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    kinds: dict[str, list[int]] = {"stack": [], "input": [], "output": []}
    for axis, letter in enumerate(kernel):
        known = (letter in inputs, letter in result)
        kind = {
            (True, True): "stack",
            (True, False): "input",
            (False, True): "output",
        }.get(known)
        if kind is None or letter == "." or kernel.count(letter) > 1:
            raise UserError(
                f"einsum {einsum_str!r}: every kernel axis must be named once and be in"
                f" the input or the output, got {letter!r}. Keep this layer dense."
            )
        kinds[kind].append(axis)
    if not kinds["input"] or not kinds["output"]:
        raise UserError(
            f"einsum {einsum_str!r}: the kernel needs an axis that is contracted and"
            " one that is new in the output to be a matrix. Keep this layer dense."
        )
    shape = tuple(kernel_shape)
    return Fold(shape, shape, *(tuple(kinds[kind]) for kind in kinds))


@dataclasses.dataclass(frozen=True)
class ConvFold(Fold):
    """The fold of a convolution kernel `(*k, c / groups, f)`.

    Args:
      groups: Number of feature groups; more than one makes a stack axis.
      first_axes: Spatial axes that the first convolution handles; the second handles
        the others.
      transposed: Whether kernels are `(*k, f, c)`, as those of a transposed convolution
        with `transpose_kernel`.
    """

    groups: int
    first_axes: tuple[int, ...]
    transposed: bool = False

    def first_kernel(self, u: Float[Array, "*g i r"]) -> Float[Array, "... c gr"]:
        """Returns `u` as the first convolution's kernel: c -> groups * r channels."""
        return self._kernel(u, self.input_shape[:-1], self.first_axes)

    def second_kernel(self, v: Float[Array, "*g r o"]) -> Float[Array, "... r f"]:
        """Returns `v` as the second convolution's kernel: groups * r -> f filters."""
        columns = jnp.moveaxis(v, -2, -1)  # (*g, o, r): output axes first, as for u
        *spatial, filters = self.output_shape
        *groups, rank, _ = v.shape
        columns = placement.reshape(columns, *groups, math.prod(spatial), filters, rank)
        columns = jnp.swapaxes(columns, -1, -2)
        columns = placement.reshape(
            columns, *groups, math.prod(spatial) * rank, filters
        )
        return self._kernel(columns, spatial, self.second_axes)

    @property
    def scheme(self) -> int:
        """The number of the scheme in the module's table."""
        if not self.second_axes:
            return 0
        return {(1,): 1, (0,): 2, (): 3}[self.first_axes]

    @property
    def second_axes(self) -> tuple[int, ...]:
        """Spatial axes that the second convolution handles."""
        spatial = range(len(self.kernel_shape) - 2)
        return tuple(axis for axis in spatial if axis not in self.first_axes)

    def _kernel(
        self,
        factor: Float[Array, "*g sc n"],
        spatial: Sequence[int],
        axes: Sequence[int],
    ) -> Float[Array, "..."]:
        """A factor `(*g, spatial * c, n)` as a kernel `(*k or 1, c, groups * n)`."""
        *_, rows, features = factor.shape
        places = math.prod(spatial)
        grouped = placement.reshape(
            factor, self.groups, places, rows // places, features
        )
        kernel = jnp.moveaxis(grouped, 0, -2)  # (spatial, c, g, n)
        sizes = [1] * (len(self.kernel_shape) - 2)
        for axis, size in zip(axes, spatial, strict=True):
            sizes[axis] = size
        features *= self.groups
        kernel = placement.reshape(kernel, *sizes, kernel.shape[1], features)
        return jnp.swapaxes(kernel, -1, -2) if self.transposed else kernel


def conv_fold(
    kernel_size: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    groups: int = 1,
    scheme: int = 0,
    transposed: bool = False,
) -> ConvFold:
    """Returns the fold of a convolution by one of the four schemes of the module's
    table.

    A transposed convolution is one over inputs with zeros in between, so that it folds
    alike; `transposed` only says that its kernel holds filters before channels.
    """
    spatial = len(kernel_size)
    by_scheme = {
        0: tuple(range(spatial)),
        1: (1,),
        2: (0,),
        3: (),
    }
    known = type(scheme) is int and scheme in by_scheme
    if not known or (scheme in (1, 2) and spatial != 2):
        raise UserError(
            "conv scheme: must be 0 or 3, or for two spatial axes 1 or 2, got"
            f" {scheme!r} for kernel size {tuple(kernel_size)}. Use 0."
        )
    first = by_scheme[scheme]
    second = tuple(axis for axis in range(spatial) if axis not in first)
    channels = in_features // groups
    if transposed:
        return ConvFold(
            (*kernel_size, out_features, in_features),
            (*kernel_size, out_features, in_features),
            (),
            (*first, spatial + 1),
            (*second, spatial),
            1,
            first,
            transposed,
        )
    kernel_shape = (*kernel_size, channels, out_features)
    view_shape: tuple[int, ...]
    view_shape = (*kernel_size, channels, groups, out_features // groups)
    stack_axes: tuple[int, ...] = (spatial + 1,)
    filters = spatial + 2
    if groups == 1:
        view_shape, stack_axes, filters = kernel_shape, (), spatial + 1
    return ConvFold(
        kernel_shape,
        view_shape,
        stack_axes,
        (*first, spatial),
        (*second, filters),
        groups,
        first,
    )
