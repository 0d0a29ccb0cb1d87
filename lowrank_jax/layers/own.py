"""Low-rank layers that run their dense twin's own forward on the merged kernel.

For layers whose forward this library does not know: subclasses of Flax's layers that
change it, and classes of the user's. The low-rank type is a subclass of the twin's, so
that every method of it runs as written and reads the merged kernel where it reads
the kernel.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.folds import Fold
from lowrank_jax.layers.base import LowRankLayer


@dataclasses.dataclass(frozen=True)
class MergedCost(LayerCost):
    """The cost of a layer that always multiplies by its merged kernel."""

    def form_macs(self, rank: int) -> int:
        """Returns the dense MACs of a matrix whose rank is above 0."""
        return self.in_size * self.out_size * self.dense_positions if rank else 0


class OwnForward(LowRankLayer):
    """A layer with the forward function of its dense twin, whatever that is."""

    @classmethod
    def cost_of(
        cls,
        layer: nnx.Module,
        fold: Fold,
        inputs: jax.ShapeDtypeStruct,
        outputs: jax.ShapeDtypeStruct,
    ) -> LayerCost:
        """Counts one multiplication by each matrix for each row of the input."""
        matrices = math.prod(fold.stack_shape)
        rows = math.prod(inputs.shape) // fold.input_size
        return MergedCost(fold.input_size, fold.output_size, matrices, rows, rows, rows)


def own_forward(
    dense_type: type[nnx.Module],
    kernel: str,
    inputs: Sequence[int],
    outputs: Sequence[int],
    stack: Sequence[int],
) -> type[LowRankLayer]:
    """Makes the low-rank type of a class whose Param `kernel` is a matrix.

    Args:
      dense_type: The class.
      kernel: Name of the Param.
      inputs: Axes of the Param that are the rows of the matrix.
      outputs: Axes that are its columns.
      stack: Axes with one matrix each.
    """
    axes = len(inputs) + len(outputs) + len(stack)
    if sorted((*inputs, *outputs, *stack)) != list(range(axes)) or not (
        inputs and outputs
    ):
        raise UserError(
            f"register({dense_type.__name__}): inputs, outputs and stack must share the"
            f" axes 0, 1, ... of {kernel!r} between them, got {tuple(inputs)},"
            f" {tuple(outputs)} and {tuple(stack)}. Name each axis once."
        )

    def fold_of(cls: type[LowRankLayer], dense: nnx.Module) -> Fold:
        shape = getattr(dense, kernel).shape
        if len(shape) < axes:
            raise UserError(
                f"{dense_type.__name__}: {kernel!r} must have {axes} axes, as it was"
                f" registered, got shape {shape}. Keep this layer dense."
            )
        shape = tuple(shape[len(shape) - axes :])
        return Fold(shape, shape, tuple(stack), tuple(inputs), tuple(outputs))

    return _subclass((OwnForward,), dense_type, kernel, {"fold_of": fold_of})


@functools.cache
def subclass_of(
    low_rank: type[LowRankLayer], dense_type: type[nnx.Module]
) -> type[LowRankLayer]:
    """Makes the low-rank type of a subclass of the class that `low_rank` stands for.

    It multiplies by the factors where the subclass leaves the forward as it is.
    """
    if not _changes(dense_type, low_rank.dense_type):
        return _subclass((low_rank,), dense_type, low_rank.kernel_name, {})

    def fold_of(cls: type[LowRankLayer], dense: nnx.Module, **options: Any) -> Fold:
        return low_rank.fold_of(dense, **options)

    def cost_of(cls: type[LowRankLayer], *call: Any) -> LayerCost:
        cost = low_rank.cost_of(*call)
        return MergedCost(
            **{x.name: getattr(cost, x.name) for x in dataclasses.fields(cost)}
        )

    methods = {"fold_of": fold_of, "cost_of": cost_of}
    options = {"fold_options": low_rank.fold_options}
    return _subclass(
        (OwnForward,), dense_type, low_rank.kernel_name, methods, **options
    )


def _changes(dense_type: type, base: type) -> bool:
    """Whether a subclass has something of its base's otherwise than the base has it.

    All that the base's forward may run or read counts, not `__call__` alone: a helper
    method, a property, a constant of the class. What the subclass adds under new names
    does not, nor does its `__init__`, for the attributes that this sets are taken over.
    """
    members = dict(inspect.getmembers_static(dense_type))
    return any(
        members.get(name) is not member
        for name, member in inspect.getmembers_static(base)
        if name != "__init__" and not _is_record(name, member)
    )


def _is_record(name: str, member: Any) -> bool:
    """Whether Python or NNX writes this about every class, such as `__doc__`."""
    return name in vars(_Plain) or (name.startswith("__") and not callable(member))


class _Plain(nnx.Module):
    """A class that changes nothing, for the names that it has all the same."""

    annotated: int


def _subclass(
    bases: tuple[type, ...],
    dense_type: type[nnx.Module],
    kernel: str,
    methods: dict[str, Any],
    **attributes: Any,
) -> type[LowRankLayer]:
    """Makes a class of ours that is a subclass of a dense one too.

    Ours come first, for the factors; any method that they do not have, the forward of
    an `OwnForward` included, is the dense class's, which reads `kernel` as a property
    that merges (`LowRankLayer`). `methods` become class methods.
    """

    def __init__(
        self: Any, *args: Any, max_rank: int | None = None, **options: Any
    ) -> None:
        self._adopt(dense_type(*args, **options), max_rank=max_rank)

    return type(
        f"LowRank{dense_type.__name__}",
        (*bases, dense_type),
        {
            "__init__": __init__,
            "__module__": dense_type.__module__,
            "__doc__": f"`{dense_type.__name__}` with a factored `{kernel}`.",
            "dense_type": dense_type,
            "kernel_name": kernel,
            **attributes,
            **{name: classmethod(method) for name, method in methods.items()},
        },
    )
