"""A low-rank matrix Param that a module of the user's holds itself."""

from typing import Any, ClassVar, NoReturn, Self

import jax
from flax import nnx

from lowrank_jax import nnx_internals
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.folds import Fold, linear_fold
from lowrank_jax.layers.base import LowRankLayer
from lowrank_jax.layers.merged import MergedReads


class LowRankParam(MergedReads, LowRankLayer):
    """An `nnx.Param` in factored form, merged where it is read.

    Stands in the module at the Param's place; the module's code goes on reading it by
    `[...]`, `.value`, `.shape`, `.T` and arithmetic. The last two axes are the matrix,
    axes before them hold one matrix each.

    >>> param = LowRankParam.from_dense(nnx.Param(jax.numpy.eye(4)), max_rank=4)
    >>> (jax.numpy.ones((2, 4)) @ param).shape, param.T.shape
    ((2, 4), (4, 4))
    """

    dense_type = nnx.Param
    param_type: type[nnx.Param]
    kernel_name: ClassVar[str] = "value"

    @classmethod
    def fold_of(cls, dense: nnx.Param) -> Fold:
        if len(dense.shape) < 2:
            raise UserError(
                f"Param: must have two axes to be a matrix, got shape {dense.shape}."
                " Keep it dense."
            )
        return linear_fold(*dense.shape[-2:])

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> NoReturn:
        raise AssertionError("a Param is never called")

    @classmethod
    def from_dense(  # type: ignore[override]  # a Param's fold may be given whole
        cls,
        dense: nnx.Param,
        *,
        max_rank: int | None = None,
        factors: Factors | None = None,
        fold: Fold | None = None,
    ) -> Self:
        """Returns the low-rank twin of a Param.

        Args:
          dense: The Param.
          max_rank: Rank to allocate, full by default.
          factors: Factors to use instead of the Param's balanced SVD.
          fold: How factors of a layer that has this very Param as its kernel fold.
        """
        layer = nnx_internals.blank(cls)
        fold = cls.fold_of(dense) if fold is None else fold
        layer._take(cls.__name__, dense, fold, max_rank, factors)
        layer.param_type = type(dense)
        return layer

    def to_dense(self, kernel: nnx.Param | None = None) -> Any:
        """Returns the Param, of its own type, merged at the active rank."""
        kernel = nnx.Param(self.merged_kernel()) if kernel is None else kernel
        same = type(kernel) is self.param_type
        return kernel if same else self.param_type(kernel.get_value())
