"""`Factors`: one weight matrix in ordered low-rank form, the object everything works
on.

Letters: `i` in, `o` out, `r` rank; `stack` are leading axes, one for modules stacked by
`nnx.vmap` or `nnx.scan`, one for the groups of a convolution.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lowrank_jax import linalg
from lowrank_jax.cost import RankValue, flatten_rank


class Rank(nnx.Variable):
    """The active rank of a `Factors`: int32, `(*stack)`, or `(*stack, b)` per
    example."""


class Factors(nnx.Module):
    """A matrix `W (i, o) = u (i, r) · diag(|s|) (r) · v (r, o)` with an ordered rank
    axis.

    Only the first `rank` columns act. The active rank is a traced array, so changing it
    never recompiles; columns at or past it contribute nothing and get exactly zero
    gradient. All arrays may carry leading stack axes.

    Args:
      u: Input side, `(*stack, i, r)`.
      v: Output side, `(*stack, r, o)`.
      s: Scales, `(*stack, r)`, or None for a product of two.
    """

    def __init__(
        self,
        u: Float[Array, "*stack i r"],
        v: Float[Array, "*stack r o"],
        s: Float[Array, "*stack r"] | None = None,
    ):
        stack, allocated = u.shape[:-2], u.shape[-1]
        if v.shape[:-1] != (*stack, allocated) or (
            s is not None and s.shape != (*stack, allocated)
        ):
            raise ValueError(
                "Factors: u (*stack, i, r), s (*stack, r) and v (*stack, r, o) must"
                " agree"
                f" in stack and r, got {u.shape}, {getattr(s, 'shape', None)} and"
                f" {v.shape}. Transpose them to this order."
            )
        self.u = nnx.Param(u)
        self.s = nnx.data(None if s is None else nnx.Param(s))
        self.v = nnx.Param(v)
        self.rank = Rank(jnp.full(stack, allocated, jnp.int32))
        self.per_example = False

    @classmethod
    def from_matrix(
        cls, matrix: Float[Array, "*stack i o"], max_rank: int, *, with_s: bool = False
    ) -> "Factors":
        """The best factors of a matrix: balanced, or with the singular values in
        `s`."""
        if with_s:
            u, s, v = linalg.truncated_svd(matrix, max_rank)
            return cls(u, v, s)
        return cls(*linalg.balanced_svd(matrix, max_rank))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.u.shape[:-2]

    @property
    def in_size(self) -> int:
        return self.u.shape[-2]

    @property
    def out_size(self) -> int:
        return self.v.shape[-1]

    @property
    def max_rank(self) -> int:
        """The allocated rank: how many columns there are."""
        return self.u.shape[-1]

    def arrays(
        self,
    ) -> tuple[
        Float[Array, "*stack i r"],
        Float[Array, "*stack r"] | None,
        Float[Array, "*stack r o"],
    ]:
        """`u`, `s` (or None) and `v` with all allocated columns."""
        return self.u[...], None if self.s is None else self.s[...], self.v[...]

    def mask(self) -> Bool[Array, "*stack r"]:
        """True for the columns that act; a further axis `b` before `r` per example."""
        rank = self.rank[...]
        expected = len(self.stack_shape) + self.per_example
        if rank.ndim != expected:
            raise ValueError(
                f"rank: must have {expected} axes beside u {self.u.shape}"
                f" (per_example={self.per_example}), got shape {rank.shape}. Under"
                " nnx.scan or nnx.vmap map the Rank variables over the layer axis, as"
                " the parameters: nnx.StateAxes({(nnx.Param, Rank): 0, ...: None})."
            )
        shape = (*rank.shape, self.max_rank)
        return jax.lax.broadcasted_iota(jnp.int32, shape, rank.ndim) < rank[..., None]

    def active_u(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack i r"]:
        """`u diag(|s|)` with the columns past the rank set to zero.

        Masking this one side is enough: the tail of `v` then meets zeros both ways.
        With one rank per example there is no common mask, and none is applied.
        """
        u, s, _ = self.arrays()
        if s is not None:
            u = u * jnp.abs(s)[..., None, :]
        if not self.per_example:
            u = jnp.where(self.mask()[..., None, :], u, 0)
        return u if dtype is None else u.astype(dtype)

    def active_v(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack r o"]:
        """`v`, in the dtype of the computation."""
        v = self.v[...]
        return v if dtype is None else v.astype(dtype)

    def matrix(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*stack i o"]:
        """The merged matrix at the active rank."""
        if self.per_example:
            raise ValueError(
                "rank: must be one number to merge the factors, got one per example."
                " Set a rank with set_ranks first."
            )
        return self.active_u(dtype) @ self.active_v(dtype)

    def mask_hidden(self, hidden: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies per-example ranks to `x u`; with a common rank `u` is masked
        already."""
        if not self.per_example:
            return hidden
        mask = self.mask()
        stack = len(self.stack_shape)
        batch = hidden.shape[stack] if hidden.ndim >= mask.ndim else None
        if batch != mask.shape[stack]:
            raise ValueError(
                "rank: one rank per example needs as many ranks as examples, got"
                f" {mask.shape[stack]} for a batch of {batch}. Sample ranks for this"
                " batch size, and keep the batch as the first axis."
            )
        between = hidden.ndim - mask.ndim
        mask = mask.reshape(*mask.shape[:-1], *[1] * between, mask.shape[-1])
        return jnp.where(mask, hidden, 0)

    def cut(self, rank: RankValue) -> None:
        """Drops the columns past `rank`, in place; a stack keeps its largest rank."""
        allocated = max(flatten_rank(rank), default=0)
        self.u.set_value(self.u[...][..., :allocated])
        self.v.set_value(self.v[...][..., :allocated, :])
        if self.s is not None:
            self.s.set_value(self.s[...][..., :allocated])
        self.set_rank(rank)

    def set_rank(self, rank: RankValue | Int[Array, "..."]) -> None:
        """Sets the active rank, in place: one number, one per stacked matrix, or an
        array.

        A traced or concrete array of shape `(*stack, b)` sets one rank per example.
        Values are not checked here (they may be traced); `surgery.set_ranks` does.
        """
        value = jnp.asarray(rank, jnp.int32)
        stack = self.stack_shape
        per_example = value.ndim == len(stack) + 1
        if value.ndim and value.shape[: value.ndim - per_example] != stack:
            raise ValueError(
                f"rank: must be one number, or an array of shape {stack} (a rank for"
                " each"
                f" matrix) or {(*stack, 'batch')}, got shape {value.shape}. Give one of"
                " these."
            )
        self.per_example = per_example
        if not per_example:
            value = jnp.broadcast_to(value, stack)
        self.rank.set_value(value)

    def get_rank(self) -> RankValue:
        """The active rank as plain Python numbers (nested lists for a stack)."""
        return np.asarray(self.rank[...]).tolist()
