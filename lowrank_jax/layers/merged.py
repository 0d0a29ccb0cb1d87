"""Merged kernels that foreign code reads as if they were an `nnx.Param`."""

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.folds import Fold

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_OPERATORS = [
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r")),
    *("__neg__", "__pos__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"),
]


class MergedReads:
    """What reads as an `nnx.Param` with the merged kernel: `[...]`, `.value`,
    arithmetic, and the attributes of an array.

    Every read multiplies the factors at the active rank, so that gradients reach them;
    the shape and the dtype are known without. It cannot be written to.
    """

    __array_priority__ = 100  # NumPy lets the operators below answer
    factors: Factors
    fold: Fold

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.factors.stack_shape
        lead = stack[: len(stack) - len(self.fold.stack_axes)]
        return (*lead, *self.fold.kernel_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.factors.u.dtype

    def get_value(self) -> Any:
        """Returns the merged kernel; where the factors are abstract, its shape."""
        if isinstance(self.factors.u.get_value(), jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        return self.fold.to_kernel(self.factors.matrix())

    @property
    def value(self) -> Float[Array, "..."]:
        return self.get_value()

    @value.setter
    def value(self, value: Any) -> NoReturn:
        refuse_writing(type(self).__name__)

    def set_value(self, value: Any) -> NoReturn:
        refuse_writing(type(self).__name__)

    def get_raw_value(self) -> Float[Array, "..."]:
        return self.get_value()

    @property
    def raw_value(self) -> Float[Array, "..."]:
        return self.get_value()

    @raw_value.setter
    def raw_value(self, value: Any) -> NoReturn:
        refuse_writing(type(self).__name__)

    def set_raw_value(self, value: Any, **options: Any) -> NoReturn:
        refuse_writing(type(self).__name__)

    def get_metadata(self, *name: str, **options: Any) -> Any:
        """Reads the metadata of a fresh `nnx.Param`, which are what a merged one
        has."""
        return nnx.Param(None).get_metadata(*name, **options)

    def has_metadata(self, name: str) -> bool:
        return nnx.Param(None).has_metadata(name)

    @property
    def sharding_names(self) -> Any:
        return self.get_metadata("out_sharding", default=None)

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        value = self.get_value()
        return value if index is Ellipsis else value[index]

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        refuse_writing(type(self).__name__)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Float[Array, "..."]]:
        return iter(self.get_value())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.get_value(), dtype)

    def __jax_array__(self) -> Float[Array, "..."]:
        return self.get_value()

    def __getattr__(self, name: str) -> Any:
        # Only what every array has: NNX asks modules for many other names.
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.get_value(), name)


def _operator(name: str) -> Any:
    def apply(self: MergedReads, *others: Any) -> Any:
        return getattr(self.get_value(), name)(*others)

    return apply


for _name in _OPERATORS:
    setattr(MergedReads, _name, _operator(_name))


class MergedKernel(MergedReads):
    """The merged kernel of a layer, as it reads itself.

    To JAX it is a tree with the merged array as its one leaf, as an `nnx.Param` is with
    its value, and is one where such a tree is built again (inside `jax.jit`). So what
    takes a Param takes it: functions of `jax.numpy`, `jax.tree` and transformations.

    Args:
      factors: The layer's factors.
      fold: The layer's fold.
    """

    def __init__(self, factors: Factors, fold: Fold):
        self.factors = factors
        self.fold = fold


def _flatten(kernel: MergedKernel) -> tuple[tuple[Any, ...], None]:
    return (kernel.get_value(),), None


def _flatten_with_keys(kernel: MergedKernel) -> tuple[tuple[Any, ...], None]:
    return ((jax.tree_util.GetAttrKey("value"), kernel.get_value()),), None


def _unflatten(_: None, children: Iterable[Any]) -> Any:
    (value,) = children
    return nnx.Param(value)


jax.tree_util.register_pytree_with_keys(
    MergedKernel, _flatten_with_keys, _unflatten, _flatten
)


def refuse_writing(name: str) -> NoReturn:
    """Raises the error for a write to what is merged when it is read."""
    raise UserError(
        f"{name}: the merged kernel is read-only, got a write. Set the factors (`u`,"
        " `v`), or keep this layer dense in the rules."
    )
