"""What all low-rank layers share: birth from a dense twin, and the way back."""

import functools
from typing import Any, ClassVar, Self

import jax
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.folds import Fold


class LowRankLayer(nnx.Module):
    """A Flax layer whose kernel is a `Factors`, folded into a matrix by a `Fold`.

    It keeps every attribute of its dense twin (features, dtypes, bias, ...) under the
    same name, but for the kernel, and computes the merged order by the twin's own
    forward function, so that both agree in every option that Flax has.

    A subclass names its `dense_type` and says how a kernel folds (`fold_of`), how often
    one example multiplies by each factor (`cost_of`) and how to apply the factors.
    """

    dense_type: ClassVar[type[nnx.Module]]
    kernel_name: ClassVar[str] = "kernel"

    factors: Factors
    fold: Fold

    @classmethod
    def fold_of(cls, dense: nnx.Module, **options: Any) -> Fold:
        """The fold of a dense layer's kernel."""
        raise NotImplementedError

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        """Parameters and MACs of a layer, dense or low-rank, for these shapes.

        Args:
          layer: The layer; only its attributes are read.
          fold: Its fold.
          inputs: Shape of a batch of one example.
          outputs: Shape of the result.
        """
        raise NotImplementedError

    @classmethod
    def from_dense(
        cls,
        dense: nnx.Module,
        *,
        max_rank: int | None = None,
        factors: Factors | None = None,
        **fold_options: Any,
    ) -> Self:
        """The low-rank twin of a dense layer.

        Args:
          dense: The layer to start from; it is left as it is, its bias is shared.
          max_rank: Rank to allocate, at most that of the kernel's matrix (the default).
            Full rank keeps the function.
          factors: Factors to use instead of the balanced SVD of the kernel.
          **fold_options: What the fold can choose (`scheme` for convolutions).

        Raises:
          ValueError: The layer has no such form, or `max_rank` is out of bounds.
        """
        layer = _blank(cls)
        layer._adopt(dense, max_rank=max_rank, factors=factors, **fold_options)
        return layer

    def _adopt(
        self,
        dense: nnx.Module,
        *,
        max_rank: int | None = None,
        factors: Factors | None = None,
        **fold_options: Any,
    ) -> None:
        fold = self.fold_of(dense, **fold_options)
        max_rank = fold.full_rank if max_rank is None else max_rank
        if not 0 <= max_rank <= fold.full_rank:
            raise UserError(
                f"{type(self).__name__}: max_rank must be in [0, {fold.full_rank}], got"
                f" {max_rank}. Lower it; a matrix {fold.input_size} x"
                f" {fold.output_size} has no higher rank."
            )
        if factors is None:
            matrix = fold.to_matrix(getattr(dense, self.kernel_name)[...])
            factors = Factors.from_matrix(matrix, max_rank)
        _copy_attributes(dense, self, without={self.kernel_name})
        self.factors = factors
        self.fold = fold

    def to_dense(self, kernel: nnx.Param | None = None) -> nnx.Module:
        """The dense twin, its kernel merged at the active rank (or the one given)."""
        dense = _blank(self.dense_type)
        _copy_attributes(self, dense, without={"factors", "fold"})
        kernel = nnx.Param(self.merged_kernel()) if kernel is None else kernel
        setattr(dense, self.kernel_name, kernel)
        return dense

    def merged_kernel(self, dtype: Any = None) -> Float[Array, "..."]:
        """The kernel at the active rank, in the dense twin's shape."""
        return self.fold.to_kernel(self.factors.matrix(dtype))

    def _first_call(self, inputs: Array, **attributes: Any) -> Array:
        """As `_dense_call`, without a bias: the first of two products."""
        return self._dense_call(inputs, bias=None, use_bias=False, **attributes)

    def _dense_call(
        self, inputs: Array, *, out_sharding: Any = None, **attributes: Any
    ) -> Array:
        """The dense twin's forward function with some attributes replaced."""
        view = object.__new__(self.dense_type)
        vars(view).update({**vars(self), **attributes})
        return view(inputs, out_sharding=out_sharding)


@functools.cache
def _blank_type(cls: type[nnx.Module]) -> type[nnx.Module]:
    return type(cls.__name__, (cls,), {"__init__": lambda self: None})


def _blank(cls: type[nnx.Module]) -> Any:
    """An instance of an NNX class whose own `__init__` has not run."""
    instance = _blank_type(cls)()
    object.__setattr__(instance, "__class__", cls)
    return instance


def _copy_attributes(source: nnx.Module, target: nnx.Module, without: set[str]) -> None:
    """Sets the target's attributes to the source's, NNX's own bookkeeping left out."""
    for name, value in vars(source).items():
        if name not in without and not name.startswith("_pytree"):
            absent = name == "bias" and value is None
            setattr(target, name, nnx.data(None) if absent else value)
