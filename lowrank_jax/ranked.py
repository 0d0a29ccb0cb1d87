"""The active rank in a model: a traced array beside the factors, and its mask."""

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lowrank_jax import placement
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Limits, RankValue


class Rank(nnx.Variable):
    """The active rank of a `Factors`: int32, `(*stack)`, or `(*stack, b)` per
    example."""


class Ranked(nnx.Module):
    """What holds a rank axis of which the first `rank` columns act.

    A subclass sets `rank` to a `Rank` and `per_example` to whether that one has a
    trailing axis for examples, and says what its stack and allocated rank are.

    Attributes:
      nested: Whether a lower rank of it is a model.
      rank_axes: Of each array the axes, from the end, along which a prefix is a lower
        rank.
    """

    nested: ClassVar[bool] = True
    rank_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    rank: Rank
    per_example: bool

    @property
    def stack_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def max_rank(self) -> int:
        """The allocated rank: how many columns there are."""
        raise NotImplementedError

    def mask(self) -> Bool[Array, "*stack r"]:
        """Returns true for the columns that act; per example with an axis `b` more."""
        rank = self.rank[...]
        expected = len(self.stack_shape) + self.per_example
        if rank.ndim != expected:
            raise UserError(
                f"rank: must have {expected} axes for a stack {self.stack_shape}"
                f" (per_example={self.per_example}), got shape {rank.shape}. Under"
                " nnx.scan or nnx.vmap map the Rank variables over the layer axis, as"
                " the parameters: nnx.StateAxes({(nnx.Param, Rank): 0, ...: None})."
            )
        shape = (*rank.shape, self.max_rank)
        traced = self.rank_is_traced
        # a known mask is a constant of the program, which drops one that masks nothing
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            columns = jax.lax.broadcasted_iota(jnp.int32, shape, rank.ndim)
            return columns < rank[..., None]

    def zero_masked(self) -> None:
        """Sets what lies past the active rank to zero, in place; it may be traced."""
        for name, mask in self.rank_masks().items():
            array = getattr(self, name)
            placement.replace(array, placement.masked(mask, array[...]))

    def rank_masks(self) -> dict[str, Bool[Array, "..."]]:
        """Tells for each array which of its numbers lie within the active rank.

        Broadcastable; with one rank per example, within the highest of them.
        """
        acting = self.mask()
        if self.per_example:
            acting = acting.any(axis=-2)
        masks = {}
        for name, axes in self._rank_arrays():
            mask: Any = True
            for axis in axes:
                trailing = getattr(self, name).ndim - len(self.stack_shape)
                shape = [*self.stack_shape, *[1] * trailing]
                shape[axis] = self.max_rank
                mask = mask & acting.reshape(shape)
            masks[name] = mask
        return masks

    def _rank_arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """The arrays there are of `rank_axes`, with these axes."""
        return [
            (name, axes)
            for name, axes in self.rank_axes.items()
            if getattr(self, name) is not None
        ]

    def mask_hidden(self, hidden: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies per-example ranks to `x u`; with a common rank `u` is masked
        already."""
        if not self.per_example:
            return hidden
        mask = self.mask()
        stack = len(self.stack_shape)
        batch = hidden.shape[stack] if hidden.ndim >= mask.ndim else None
        if batch != mask.shape[stack]:
            raise UserError(
                "rank: one rank per example needs as many ranks as examples, got"
                f" {mask.shape[stack]} for a batch of {batch}. Sample ranks for this"
                " batch size, and keep the batch as the first axis."
            )
        between = hidden.ndim - mask.ndim
        mask = mask.reshape(*mask.shape[:-1], *[1] * between, mask.shape[-1])
        return placement.masked(mask, hidden)

    def set_rank(self, rank: RankValue | Int[Array, "..."]) -> None:
        """Sets the active rank, in place: one number, one per stacked matrix, or an
        array.

        A traced or concrete array of shape `(*stack, b)` sets one rank per example.
        Values are not checked here (they may be traced); `set_ranks` does. Known ones
        stay known under a trace, and lie where the rank before them did, for which the
        model may be compiled.
        """
        value = _as_rank(rank)
        stack = self.stack_shape
        per_example = value.ndim == len(stack) + 1
        if value.ndim and value.shape[: value.ndim - per_example] != stack:
            raise UserError(
                f"rank: must be one number, or an array of shape {stack} (a rank for"
                f" each matrix) or {(*stack, 'batch')}, got shape {value.shape}. Give"
                " one of these."
            )
        self.per_example = per_example
        if not per_example:
            value = _full(stack, value)
        placement.replace(self.rank, value)

    def limits(self) -> Limits:
        """Returns what bounds the rank: active to cut, allocated to set."""
        return Limits(self._known_rank(), self.max_rank, self.nested)

    def lowered(self, rank: RankValue) -> RankValue | Int[Array, "..."]:
        """Returns a rank to cut to, no higher than the active one where that is traced.

        A known active rank bounds it by a check (`check_ranks`) instead.
        """
        if not self.rank_is_traced:
            return rank
        active = self.rank.get_value()
        if self.per_example:
            active = jnp.max(active, axis=-1, initial=0)
        return jnp.minimum(_as_rank(rank), active)

    @property
    def rank_is_traced(self) -> bool:
        """Whether the active rank is an argument of a trace, so that nobody knows
        it."""
        return isinstance(self.rank.get_value(), jax.core.Tracer)

    def _known_rank(self) -> RankValue:
        """The active rank, the highest of a batch; the allocated one where it is
        abstract or traced."""
        rank = self.rank.get_value()
        if self.rank_is_traced or isinstance(rank, jax.ShapeDtypeStruct):
            return np.full(self.stack_shape, self.max_rank).tolist()
        if self.per_example:
            return placement.to_host(rank).max(axis=-1, initial=0).tolist()
        return self.get_rank()

    def get_rank(self) -> RankValue:
        """Returns the active rank as plain numbers, nested lists for a stack."""
        return placement.to_host(self.rank[...]).tolist()


def known_rank(stack: tuple[int, ...], rank: int) -> Int[Array, "*stack"]:
    """Makes the array of an active rank, known even under a trace."""
    return _full(stack, _as_rank(rank))


def _as_rank(rank: RankValue | Int[Array, "..."]) -> Int[Array, "..."]:
    """A rank as an int32 array; no trace hides a number that is known."""
    traced = isinstance(rank, jax.core.Tracer)
    array: Any = rank if traced else placement.to_host(rank)
    if array.size and not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(
            f"rank: must be whole numbers, got {array.dtype}. Round them to int32."
        )
    if traced:
        return array.astype(jnp.int32)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(array, jnp.int32)


def _full(stack: tuple[int, ...], value: Int[Array, "..."]) -> Int[Array, "*stack"]:
    """A rank for each matrix of a stack."""
    if isinstance(value, jax.core.Tracer):
        return jnp.broadcast_to(value, stack)
    with jax.ensure_compile_time_eval():
        return jnp.broadcast_to(value, stack)
