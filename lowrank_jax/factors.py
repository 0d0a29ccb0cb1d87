"""`Factors`: one weight matrix in ordered low-rank form, the object everything works
on.

Letters: `i` in, `o` out, `r` rank; `stack` are leading axes, one for modules stacked by
`nnx.vmap` or `nnx.scan`, one for the groups of a convolution.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lowrank_jax import linalg, placement
from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.ranked import Rank, Ranked, known_rank
from lowrank_jax.ranks import RankValue, flatten_rank, largest


class Factors(Ranked):
    """A matrix `W (i, o) = u (i, r) · diag(|s|) (r) · v (r, o)` with an ordered rank
    axis.

    Only the first `rank` columns act. The active rank is a traced array, so changing it
    never recompiles; columns at or past it contribute nothing and get exactly zero
    gradient. All arrays may carry leading stack axes.

    Square factors may stand between u and v, `W = u M_1 ... M_n v`: the depth of LoRITa
    (Zhang et al., 2024). They exist for training only; `canonicalize` multiplies
    them back.

    Args:
      u: Input side, `(*stack, i, r)`.
      v: Output side, `(*stack, r, o)`.
      s: Scales, `(*stack, r)`, or None for a product without.
      middle: Square factors, `(*stack, n, r, r)`, or None for a product of two.

    Another form of the product is a subclass in `forms`, with facts of its own in the
    class attributes below.

    Attributes:
      form: Its name, a key of `forms.FORMS`.
      skips_identity: Whether columns of `v` are unit vectors that `expand` skips.
      rule_options: What a rule can choose for this form, with the defaults.
    """

    form: ClassVar[str] = "factored"
    rank_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "u": (-1,),
        "s": (-1,),
        "v": (-2,),
        "middle": (-2, -1),
    }
    skips_identity: ClassVar[bool] = False
    rule_options: ClassVar[Mapping[str, Any]] = {
        "with_s": False,
        "depth": 2,
        "init": "svd",
    }

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
                f" agree in stack and r, got {u.shape}, {getattr(s, 'shape', None)} and"
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
                " Make them with the layer's from_dense."
            )
        self.u = nnx.Param(u)
        self.s = nnx.data(None if s is None else nnx.Param(s))
        self.middle = nnx.data(None if middle is None else nnx.Param(middle))
        self.v = nnx.Param(v)
        self.rank = Rank(known_rank(stack, allocated))
        self.per_example = False

    @classmethod
    def from_matrix(
        cls,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        with_s: bool = False,
        depth: int = 2,
    ) -> Self:
        """Makes the best factors of a matrix, split over a mesh as it is (`placed`).

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
        root = s ** (1 / depth)
        middle = None
        if not with_s:
            u, v = u * root[..., None, :], root[..., :, None] * v
        if depth > 2:
            square = jnp.vectorize(jnp.diag, signature="(r)->(r,r)")(root)
            middle = jnp.stack([square] * (depth - 2), axis=-3)
        return cls(u, v, s if with_s else None, middle).placed(matrix)

    @classmethod
    def random(
        cls,
        key: PRNGKeyArray,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        with_s: bool = False,
    ) -> Self:
        """Draws factors whose product has entries of a matrix's variance."""
        *stack, in_size, out_size = matrix.shape
        u, v = linalg.random_factors(
            key,
            in_size,
            out_size,
            max_rank,
            variance=jnp.var(matrix),
            stack=tuple(stack),
            dtype=matrix.dtype,
        )
        scales = jnp.ones(u.shape[:-2] + u.shape[-1:], u.dtype)
        return cls(u, v, scales if with_s else None).placed(matrix)

    @classmethod
    def from_rule(
        cls,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        rngs: nnx.Rngs | None,
        with_s: bool,
        depth: int,
        init: str,
    ) -> Self:
        """Makes the factors that a rule asks for of a kernel's matrix.

        Args:
          matrix: What to factor.
          max_rank: Rank to allocate.
          rngs: Source of keys for "random".
          with_s: Keep the singular values in `s`.
          depth: How many factors share them.
          init: "svd" of the matrix, or "random" factors of its variance.

        Raises:
          UserError: A value of another kind, or two that do not go together.
        """
        if not isinstance(with_s, bool):
            raise UserError(f"with_s must be true or false, got {with_s!r}. Choose.")
        if type(depth) is not int or depth > 64:  # each is a product in every trace
            raise UserError(f"depth must be a whole number <= 64, got {depth!r}. Mend.")
        if init not in ("svd", "random"):
            raise UserError(f"init must be 'svd' or 'random', got {init!r}. Choose.")
        if init == "svd":
            return cls.from_matrix(matrix, max_rank, with_s=with_s, depth=depth)
        if rngs is None or depth != 2:
            raise UserError(
                "init 'random' needs rngs and a depth of 2, got"
                f" rngs={rngs}, depth={depth}. Pass factorize(..., rngs=)."
            )
        return cls.random(rngs.params(), matrix, max_rank, with_s=with_s)

    def rule(self) -> dict[str, Any]:
        """Returns the rule by which `factorize` makes this form at this rank."""
        return {
            "max_rank": self.max_rank,
            "with_s": self.s is not None,
            "depth": self.depth,
        }

    @classmethod
    def from_factors(cls, factors: "Factors") -> "Factors":
        """Turns factors, all of whose columns act, into this form."""
        return factors

    def cost(self, layer_cost: LayerCost) -> LayerCost:
        """Returns what a layer costs with its matrix in this form."""
        return layer_cost

    def placed(self, matrix: Float[Array, "*stack i o"]) -> Self:
        """Returns itself, the arrays put where a matrix of this shape is.

        Rows of `u` are split over a mesh as its rows, columns of `v` as its columns,
        stack axes as its own; the rank axis and the active rank are whole.
        """
        sharding = placement.sharding_of(matrix)
        *stack, row, column = range(matrix.ndim)
        axes = {
            "u": (*stack, row, None),
            "s": (*stack, None),
            "middle": (*stack, None, None, None),
            "v": (*stack, None, column),
            "rank": (),
        }
        for name, kept in axes.items():
            if (variable := getattr(self, name)) is not None:
                placement.move(variable, placement.with_axes(sharding, *kept))
        return self

    def params(self) -> dict[str, nnx.Param]:
        """Lists the arrays that are trained, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, nnx.Param)
        }

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
        """Returns `u`, `s` (or None) and `v` with all allocated columns.

        Square factors in between are multiplied into the smaller of the two.
        """
        u, v = self.u[...], self.v[...]
        if self.middle is not None:
            u, v = self._join(u, self.middle[...], v)
        return u, None if self.s is None else self.s[...], v

    def _join(self, u: Any, middle: Array, v: Any) -> tuple[Any, Any]:
        """`u` and `v` with the square factors multiplied into the smaller one; the
        other may be None."""
        squares = [middle[..., n, :, :] for n in range(middle.shape[-3])]
        if self._joins_u:
            return functools.reduce(jnp.matmul, squares, u), v
        return u, functools.reduce(lambda right, m: m @ right, reversed(squares), v)

    @property
    def _joins_u(self) -> bool:
        return self.in_size <= self.out_size

    def active_u(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack i r"]:
        """Returns `u diag(|s|)` with the columns past the rank set to zero.

        Masking this one side is enough: the tail of `v` then meets zeros both ways.
        With one rank per example there is no common mask, and none is applied.
        """
        u = self.u[...]
        if self.s is not None:
            u = u * jnp.abs(self.s[...])[..., None, :]
        if not self.per_example:
            u = placement.masked(self.mask()[..., None, :], u)
        if self.middle is not None and self._joins_u:
            u, _ = self._join(u, self._active_middle(self.middle), v=None)
        return u if dtype is None else u.astype(dtype)

    def active_v(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack r o"]:
        """Returns `v`, in the dtype of the computation."""
        v = self.v[...]
        if self.middle is not None and not self._joins_u:
            _, v = self._join(None, self._active_middle(self.middle), v)
        return v if dtype is None else v.astype(dtype)

    def expand(
        self,
        hidden: Float[Array, "... r"],
        multiply: Callable[[Array, Array], Array],
        dtype: jax.typing.DTypeLike | None = None,
    ) -> Float[Array, "... o"]:
        """Multiplies `x u` by `v`; a form that knows columns of `v` skips them.

        Args:
          hidden: What `u` made of the inputs.
          multiply: Multiplies rows by a matrix, as the layer does.
          dtype: Of the computation.
        """
        return multiply(hidden, self.active_v(dtype))

    def _active_middle(self, middle: nnx.Param) -> Float[Array, "*stack n r r"]:
        """The square factors with the rows and columns past the rank set to zero."""
        mask = self.mask()[..., None, :]
        return placement.masked(mask[..., None] & mask[..., None, :], middle[...])

    def matrix(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*stack i o"]:
        """Returns the merged matrix at the active rank."""
        self._check_one_rank("merge the factors")
        u, v = self.active_u(dtype), self.active_v(dtype)
        product = linalg.apart(u @ placement.factor_beside(v, u))
        return placement.kept(product, placement.of_product(self.u, self.v))

    def _check_one_rank(self, purpose: str) -> None:
        if self.per_example:
            raise UserError(
                f"rank: must be one number to {purpose}, got one per example. Set a"
                " rank with set_ranks first."
            )

    def cut(self, rank: RankValue) -> None:
        """Drops the columns past `rank`, in place.

        A stack keeps its largest rank; what its matrices of a lower one have past
        theirs becomes zero, so that penalties and weight decay see nothing of it. So it
        is under a trace, where an active rank below `rank` is not known and stays.
        """
        allocated = largest(rank)
        for name, axes in self._rank_arrays():
            variable = getattr(self, name)
            array = variable[...]
            for axis in axes:
                array = jax.lax.slice_in_dim(
                    array, 0, allocated, axis=array.ndim + axis
                )
            placement.replace(variable, array)
        self.set_rank(self.lowered(rank))
        if self.rank_is_traced or min(flatten_rank(rank), default=0) < allocated:
            self.zero_masked()

    def canonicalize(self) -> None:
        """Replaces the arrays by the SVD of the product at the active rank, in place.

        Without `s` the singular values are shared equally; square factors in between
        are gone.
        """
        self._check_one_rank("have a canonical form")
        u, sigma, v = linalg.canonical_form(
            self.active_u(None), None, self.active_v(None)
        )
        if self.s is None:
            root = jnp.sqrt(sigma)
            u, v = u * root[..., None, :], root[..., :, None] * v
        else:
            placement.replace(self.s, sigma)
        placement.replace(self.u, u)
        placement.replace(self.v, v)
        self.middle = nnx.data(None)

    def set_rank(self, rank: RankValue | Int[Array, "..."]) -> None:
        if self.middle is not None and np.ndim(rank) == len(self.stack_shape) + 1:
            raise UserError(
                "rank: factors with square ones in between take no rank per example,"
                f" got shape {np.shape(rank)}. Use another sampler, or canonicalize"
                " first."
            )
        super().set_rank(rank)
