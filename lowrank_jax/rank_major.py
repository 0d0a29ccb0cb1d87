"""Factors with the rank axis first, so that a lower rank is the beginning of an array.

`u (i, r)` is kept as `(r, i)`, a stack `v (*stack, r, o)` as `(r, *stack, o)`; `v (r,
o)` and `s (r)` are so already. Letters as in `factors`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import linalg
from lowrank_jax.layers.linear import ProductLayer
from lowrank_jax.paths import find_rank_arrays, walk
from lowrank_jax.ranks import Ranks, largest

Axes = Sequence[int]

_MOST_ROWS = 32
"""Up to which `multiply_from_left` is faster, from two."""


def rank_major(model: nnx.Module, ranks: Ranks) -> dict[str, Float[Array, "r ..."]]:
    """Returns the factors of a model, cut to ranks of all layers, with these first.

    Args:
      model: A low-rank model.
      ranks: Of all layers.

    Returns:
      The arrays under the keys of `find_rank_arrays`; those that are rank-major already
      and not cut are the model's own.
    """
    factors = {}
    for key, (layer, axes, variable) in find_rank_arrays(model).items():
        kept = _prefix(variable[...], axes, largest(ranks[layer]))
        is_first = axes[0] == -kept.ndim  # jax would copy it
        factors[key] = kept if is_first else jnp.moveaxis(kept, axes[0], 0)
    return factors


def put(
    model: nnx.Module, factors: Mapping[str, Float[Array, "r ..."]], ranks: Ranks
) -> None:
    """Sets the factors of a model to the beginnings of rank-major ones, in place.

    Made to be traced: there, nothing is copied for an array that has the rank already.

    Args:
      model: A low-rank model, which may be abstract.
      factors: As of `rank_major`, of these ranks or higher ones.
      ranks: Of all layers.
    """
    for key, found in find_rank_arrays(model).items():
        rank, axes = largest(ranks[found.layer]), found.axes
        array = jnp.moveaxis(factors[key][:rank], 0, axes[0])
        found.variable.set_value(_prefix(array, axes, rank))


def views(
    model: nnx.Module, factors: Mapping[str, Float[Array, "r ..."]], ranks: Ranks
) -> dict[str, Float[Array, "r ..."]]:
    """Returns the beginnings of arrays in the host's memory, in the same memory.

    They keep the arrays alive. None of them may be donated.

    Args:
      model: Whose factors they are.
      factors: As of `rank_major`, on a CPU.
      ranks: Of all layers, not above theirs.
    """
    layers = {key: found.layer for key, found in find_rank_arrays(model).items()}
    return {
        key: _view(array, largest(ranks[layers[key]])) for key, array in factors.items()
    }


def _view(array: Array, rank: int) -> Array:
    if rank == len(array):
        return array
    (device,) = array.devices()
    rows = np.asarray(array)[:rank]
    view = jax.device_put(rows, device, may_alias=True)
    same = view.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert same or not rows.size, "jax copied what it may share"
    return view


def multiply_from_left(model: nnx.Module) -> None:
    """Has linear layers compute `(u^T x^T)^T` for `x u` on few rows, in place: for
    CPUs.

    Where `u` is rank-major, XLA (jax 0.10.2, products not fused) takes twice to three
    times as long for the latter on 2 to 32 rows of 1,024 numbers, and less on many.
    """
    for _, node in walk(model):
        if not isinstance(node, ProductLayer) or getattr(node, "dot_general_cls", None):
            continue
        if getattr(node, "dot_general", None) in (None, jax.lax.dot_general):
            node.hidden_product = _dot_general


def _dot_general(
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: tuple[tuple[Axes, Axes], tuple[Axes, Axes]],
    precision: Any = None,
    **options: Any,
) -> Float[Array, "..."]:
    """As `lax.dot_general`; few rows are multiplied from the kernel's side."""
    count = len(dimension_numbers[0][0])
    first = inputs.ndim - count
    plain = linalg.is_matrix_product(inputs.ndim, dimension_numbers, **options)
    plain = plain and not isinstance(precision, tuple)
    shape = (math.prod(kernel.shape[:count]), math.prod(kernel.shape[count:]))
    rows = inputs.size // max(shape[0], 1)
    if not plain or not 1 < rows <= _MOST_ROWS:
        return jax.lax.dot_general(
            inputs, kernel, dimension_numbers, precision=precision, **options
        )
    columns = jax.lax.dot_general(
        kernel.reshape(shape),
        inputs.reshape(-1, shape[0]),
        (((0,), (1,)), ((), ())),
        precision=precision,
        **options,
    )
    kind = jnp.finfo(columns.dtype)  # a rounding that changes nothing: XLA would turn
    columns = jax.lax.reduce_precision(columns, kind.nexp, kind.nmant)  # it back
    return columns.T.reshape(*inputs.shape[:first], *kernel.shape[count:])


def _prefix(array: Array, axes: Axes, rank: int) -> Array:
    """The part of an array within a rank; axes count from the end."""
    for axis in axes:
        if array.shape[axis] != rank:  # jax would copy it
            array = jax.lax.slice_in_dim(array, 0, rank, axis=array.ndim + axis)
    return array
