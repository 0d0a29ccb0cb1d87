"""`Factors`: one weight matrix in ordered low-rank form, the object everything works
on.

Letters: `i` in, `o` out, `r` rank; `stack` are leading axes, one for modules stacked by
`nnx.vmap` or `nnx.scan`, one for the groups of a convolution.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lowrank_jax import linalg
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Limits, RankValue, flatten_rank


class Rank(nnx.Variable):
    """The active rank of a `Factors`: int32, `(*stack)`, or `(*stack, b)` per
    example."""


class Factors(nnx.Module):
    """A matrix `W (i, o) = u (i, r) · diag(|s|) (r) · v (r, o)` with an ordered rank
    axis.

    Only the first `rank` columns act. The active rank is a traced array, so changing it
    never recompiles; columns at or past it contribute nothing and get exactly zero
    gradient. All arrays may carry leading stack axes.

    Square factors may stand between u and v, `W = u M_1 ... M_n v`: the depth of LoRITa
    (Alkhouri et al., 2024). They exist for training only; `canonicalize` multiplies
    them back.

    Args:
      u: Input side, `(*stack, i, r)`.
      v: Output side, `(*stack, r, o)`.
      s: Scales, `(*stack, r)`, or None for a product without.
      middle: Square factors, `(*stack, n, r, r)`, or None for a product of two.
    """

    def __init__(
        self,
        u: Float[Array, "*stack i r"],
        v: Float[Array, "*stack r o"],
        s: Float[Array, "*stack r"] | None = None,
        middle: Float[Array, "*stack n r r"] | None = None,
    ):
        stack, allocated = u.shape[:-2], u.shape[-1]
        if v.shape[:-1] != (*stack, allocated) or (
            s is not None and s.shape != (*stack, allocated)
        ):
            raise UserError(
                "Factors: u (*stack, i, r), s (*stack, r) and v (*stack, r, o) must"
                " agree"
                f" in stack and r, got {u.shape}, {getattr(s, 'shape', None)} and"
                f" {v.shape}. Transpose them to this order."
            )
        if middle is not None and (
            s is not None
            or middle.ndim != len(stack) + 3
            or (*middle.shape[:-3], *middle.shape[-2:])
            != (*stack, allocated, allocated)
        ):
            raise UserError(
                f"Factors: middle must be (*stack, n, r, r) beside u {u.shape}, without"
                f" s, got {middle.shape} and s {getattr(s, 'shape', None)}."
            )
        self.u = nnx.Param(u)
        self.s = nnx.data(None if s is None else nnx.Param(s))
        self.middle = nnx.data(None if middle is None else nnx.Param(middle))
        self.v = nnx.Param(v)
        self.rank = Rank(jnp.full(stack, allocated, jnp.int32))
        self.per_example = False

    @classmethod
    def from_matrix(
        cls,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        with_s: bool = False,
        depth: int = 2,
    ) -> "Factors":
        """The best factors of a matrix.

        Args:
          matrix: What to factor.
          max_rank: Rank to allocate.
          with_s: Keep the singular values in `s` instead of sharing them equally.
          depth: How many factors share them: 2, or more for square ones in between.
        """
        if depth < 2 or (with_s and depth > 2):
            raise UserError(
                "depth: must be 2, or more without with_s, got"
                f" {depth} with_s={with_s}. Use one of the two."
            )
        u, s, v = linalg.truncated_svd(matrix, max_rank)
        if with_s:
            return cls(u, v, s)
        root = s ** (1 / depth)
        u, v = u * root[..., None, :], root[..., :, None] * v
        if depth == 2:
            return cls(u, v)
        square = jnp.vectorize(jnp.diag, signature="(r)->(r,r)")(root)
        return cls(u, v, middle=jnp.stack([square] * (depth - 2), axis=-3))

    @classmethod
    def random(
        cls,
        key: PRNGKeyArray,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        with_s: bool = False,
    ) -> "Factors":
        """Random factors whose product has entries of the variance of a matrix's."""
        u, v = linalg.random_factors(
            key,
            *matrix.shape[-2:],
            max_rank,
            variance=jnp.var(matrix),
            stack=matrix.shape[:-2],
            dtype=matrix.dtype,
        )
        scales = jnp.ones(u.shape[:-2] + u.shape[-1:], u.dtype)
        return cls(u, v, scales if with_s else None)

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

    @property
    def depth(self) -> int:
        """How many matrices the product has, `s` not counted."""
        return 2 if self.middle is None else 2 + self.middle.shape[-3]

    def arrays(
        self,
    ) -> tuple[
        Float[Array, "*stack i r"],
        Float[Array, "*stack r"] | None,
        Float[Array, "*stack r o"],
    ]:
        """`u`, `s` (or None) and `v` with all allocated columns.

        Square factors in between are multiplied into the smaller of the two.
        """
        u, v = self.u[...], self.v[...]
        if self.middle is not None:
            u, v = self._join(u, self.middle[...], v)
        return u, None if self.s is None else self.s[...], v

    def _join(self, u: Array, middle: Array, v: Array) -> tuple[Array, Array]:
        """`u` and `v` with the square factors multiplied into the smaller one."""
        squares = [middle[..., n, :, :] for n in range(middle.shape[-3])]
        if self._joins_u:
            return functools.reduce(jnp.matmul, squares, u), v
        return u, functools.reduce(lambda right, m: m @ right, reversed(squares), v)

    @property
    def _joins_u(self) -> bool:
        return self.in_size <= self.out_size

    def mask(self) -> Bool[Array, "*stack r"]:
        """True for the columns that act; a further axis `b` before `r` per example."""
        rank = self.rank[...]
        expected = len(self.stack_shape) + self.per_example
        if rank.ndim != expected:
            raise UserError(
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
        u = self.u[...]
        if self.s is not None:
            u = u * jnp.abs(self.s[...])[..., None, :]
        if not self.per_example:
            u = jnp.where(self.mask()[..., None, :], u, 0)
        if self.middle is not None and self._joins_u:
            u, _ = self._join(u, self._active_middle(), v=None)
        return u if dtype is None else u.astype(dtype)

    def active_v(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack r o"]:
        """`v`, in the dtype of the computation."""
        v = self.v[...]
        if self.middle is not None and not self._joins_u:
            _, v = self._join(None, self._active_middle(), v)
        return v if dtype is None else v.astype(dtype)

    def _active_middle(self) -> Float[Array, "*stack n r r"]:
        """The square factors with the rows and columns past the rank set to zero."""
        mask = self.mask()[..., None, :]
        return jnp.where(mask[..., None] & mask[..., None, :], self.middle[...], 0)

    def matrix(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*stack i o"]:
        """The merged matrix at the active rank."""
        if self.per_example:
            raise UserError(
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
            raise UserError(
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
        if self.middle is not None:
            self.middle.set_value(self.middle[...][..., :allocated, :allocated])
        self.set_rank(rank)

    def canonicalize(self) -> None:
        """Replaces the arrays by the SVD of the product at the active rank, in place.

        Without `s` the singular values are shared equally; square factors in between
        are gone.
        """
        u, sigma, v = linalg.canonical_form(
            self.active_u(None), None, self.active_v(None)
        )
        if self.s is None:
            root = jnp.sqrt(sigma)
            u, v = u * root[..., None, :], root[..., :, None] * v
        else:
            self.s.set_value(sigma)
        self.u.set_value(u)
        self.v.set_value(v)
        self.middle = nnx.data(None)

    def set_rank(self, rank: RankValue | Int[Array, "..."]) -> None:
        """Sets the active rank, in place: one number, one per stacked matrix, or an
        array.

        A traced or concrete array of shape `(*stack, b)` sets one rank per example.
        Values are not checked here (they may be traced); `set_ranks` does.
        """
        value = jnp.asarray(rank, jnp.int32)
        stack = self.stack_shape
        per_example = value.ndim == len(stack) + 1
        if value.ndim and value.shape[: value.ndim - per_example] != stack:
            raise UserError(
                f"rank: must be one number, or an array of shape {stack} (a rank for"
                " each"
                f" matrix) or {(*stack, 'batch')}, got shape {value.shape}. Give one of"
                " these."
            )
        if per_example and self.middle is not None:
            raise UserError(
                "rank: factors with square ones in between take no rank per example,"
                f" got shape {value.shape}. Use another sampler, or canonicalize first."
            )
        self.per_example = per_example
        if not per_example:
            value = jnp.broadcast_to(value, stack)
        self.rank.set_value(value)

    def limits(self) -> Limits:
        """What bounds the rank: the active one to cut, the allocated one to set."""
        return Limits(self._known_rank(), self.max_rank)

    def _known_rank(self) -> RankValue:
        """The active rank; where it is abstract or traced, the allocated one."""
        rank = self.rank.get_value()
        if isinstance(rank, jax.core.Tracer | jax.ShapeDtypeStruct):
            return np.full(self.stack_shape, self.max_rank).tolist()
        return self.get_rank()

    def get_rank(self) -> RankValue:
        """The active rank as plain Python numbers (nested lists for a stack)."""
        return np.asarray(self.rank[...]).tolist()
