"""What all low-rank layers share: birth from a dense twin, and the way back."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lowrank_jax import nnx_internals
from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.folds import Fold
from lowrank_jax.layers.merged import MergedKernel, refuse_writing

OWN_NAMES = frozenset({"factors", "fold"})
"""What a low-rank layer adds to the attributes of its twin."""


class LowRankLayer(nnx.Module):
    """A Flax layer whose kernel is a `Factors`, folded into a matrix by a `Fold`.

    It keeps every attribute of its dense twin (features, dtypes, bias, ...) under the
    same name. Its kernel is merged where it is read (`layer.kernel[...]`, a
    `MergedKernel`), and it computes the merged order by the twin's own forward
    function, so that both agree in every option that Flax has.

    A subclass names its `dense_type` and says how a kernel folds (`fold_of`), how often
    one example multiplies by each factor (`cost_of`) and how to apply the factors.
    """

    dense_type: ClassVar[type[Any]]
    kernel_name: ClassVar[str] = "kernel"
    fold_options: ClassVar[frozenset[str]] = frozenset()

    factors: Factors
    fold: Fold

    if TYPE_CHECKING:  # the attributes of the dense twin, and those its code adds

        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **options: Any) -> Any: ...

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not isinstance(getattr(cls, cls.kernel_name, None), property):
            setattr(
                cls,
                cls.kernel_name,
                property(lambda self: MergedKernel(self.factors, self.fold)),
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.kernel_name:
            refuse_writing(f"{type(self).__name__}.{name}")
        super().__setattr__(name, value)

    @classmethod
    def fold_of(cls, dense: Any, *args: Any, **options: Any) -> Fold:
        """Returns the fold of a dense layer's kernel."""
        raise NotImplementedError

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Any,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        """Returns parameters and MACs of a layer, dense or low-rank, for these shapes.

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
        dense: Any,
        *,
        max_rank: int | None = None,
        factors: Factors | None = None,
        **fold_options: Any,
    ) -> Self:
        """Returns the low-rank twin of a dense layer.

        Args:
          dense: The layer to start from; it is left as it is, its bias is shared.
          max_rank: Rank to allocate, at most that of the kernel's matrix (the default).
            Full rank keeps the function.
          factors: Factors to use instead of the balanced SVD of the kernel, with the
            rank that they have.
          **fold_options: What the fold can choose (`scheme` for convolutions).

        Raises:
          UserError: The layer has no such form, `max_rank` is out of bounds or given
            beside factors, or the factors do not fit the kernel.
        """
        layer = nnx_internals.blank(cls)
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
        name = type(self).__name__
        if taken := OWN_NAMES & nnx_internals.attributes(dense).keys():
            raise UserError(
                f"{name}: {sorted(OWN_NAMES)} are the low-rank layer's own attributes,"
                f" got a {type(dense).__name__} with {sorted(taken)}. Rename them."
            )
        fold = self.fold_of(dense, **fold_options)
        self._take(name, getattr(dense, self.kernel_name), fold, max_rank, factors)
        nnx_internals.copy_attributes(dense, self, without={self.kernel_name})

    def _take(
        self,
        name: str,
        kernel: nnx.Param,
        fold: Fold,
        max_rank: int | None,
        factors: Factors | None,
    ) -> None:
        """Sets fold and factors, those of the kernel where none are given."""
        if factors is None:
            max_rank = fold.full_rank if max_rank is None else max_rank
            _check_rank(name, max_rank, fold)
            factors = Factors.from_matrix(fold.to_matrix(kernel[...]), max_rank)
        elif max_rank is not None:
            raise UserError(
                f"{name}: give max_rank or factors, not both, got max_rank {max_rank}"
                f" and factors of rank {factors.max_rank}. Cut the factors instead."
            )
        _check_factors(name, factors, fold, kernel.shape)
        self.factors = factors
        self.fold = fold

    def to_dense(self, kernel: nnx.Param | None = None) -> Any:
        """Returns the dense twin, its kernel merged at the active rank, or a given
        one."""
        dense = nnx_internals.blank(self.dense_type)
        nnx_internals.copy_attributes(self, dense, without=OWN_NAMES)
        kernel = nnx.Param(self.merged_kernel()) if kernel is None else kernel
        setattr(dense, self.kernel_name, kernel)
        return dense

    def merged_kernel(self, dtype: Any = None) -> Float[Array, "..."]:
        """Returns the kernel at the active rank, in the dense twin's shape."""
        return self.fold.to_kernel(self.factors.matrix(dtype))

    def _first_call(self, inputs: Array, **attributes: Any) -> Array:
        """As `_dense_call`, without a bias: the first of two products."""
        return self._dense_call(inputs, bias=None, use_bias=False, **attributes)

    def _dense_call(
        self, inputs: Array, *, out_sharding: Any = None, **attributes: Any
    ) -> Array:
        """Runs the dense twin's forward function with some attributes replaced."""
        view = nnx_internals.view_as(self.dense_type, self, **attributes)
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return view(inputs, **options)


def hidden_sharding(out_sharding: Any, ndim: int, features: int = 1) -> Any:
    """Returns the sharding of `x u` where that of `(x u) v` is asked for.

    Its rows are split alike, the rank axis is whole: where both `x` and `u` are split
    along what is summed, this is the one all-reduce of tensor parallelism, of rows x r
    numbers.

    Args:
      out_sharding: What the caller asks for (a `NamedSharding` or a spec), or None.
      ndim: How many axes the result has.
      features: How many of these are the layer's own, last.
    """
    if out_sharding is None:
        return None
    spec = getattr(out_sharding, "spec", out_sharding)
    rows = [*spec, *[None] * (ndim - len(spec))][: ndim - features]
    return like_sharding(out_sharding, *rows, None)


def like_sharding(out_sharding: Any, *spec: Any) -> Any:
    """Returns a spec, in a `NamedSharding` where the given one is."""
    if isinstance(out_sharding, NamedSharding):
        return NamedSharding(out_sharding.mesh, PartitionSpec(*spec))
    return PartitionSpec(*spec)


def _check_rank(name: str, max_rank: int, fold: Fold) -> None:
    if not 0 <= max_rank <= fold.full_rank:
        raise UserError(
            f"{name}: max_rank must be in [0, {fold.full_rank}], got"
            f" {max_rank}. Lower it; a matrix {fold.input_size} x"
            f" {fold.output_size} has no higher rank."
        )


def _check_factors(
    name: str, factors: Factors, fold: Fold, kernel_shape: tuple[int, ...]
) -> None:
    lead = kernel_shape[: len(kernel_shape) - len(fold.kernel_shape)]
    wanted = (*lead, *fold.stack_shape, fold.input_size, fold.output_size)
    given = (*factors.stack_shape, factors.in_size, factors.out_size)
    if given != wanted:
        raise UserError(
            f"{name}: the factors' product must have the shape {wanted} of the kernel's"
            f" matrix, got {given}. Make them with Factors.from_matrix of that matrix."
        )
