"""The gauge-aligned form: r (i + o - r) numbers, below dense at every rank.

`W (i, o) = u v` stays the same under `(u g)(g^-1 v)`. With `g` the r pivot columns of
`v`, the product is `u' v'`, where `u'` is W at these columns and `v'` has the identity
there, which is neither stored nor multiplied. FlexRank (Zaccone et al., 2026) takes the
leading columns, which loses all digits where they are ill-conditioned; here they are
pivots of a QR decomposition, as in PIFA (Pivoting Factorization, 2025), so that the
entries of `v'` stay near 1. A prefix of this form is no model: it is made after the
cut.

Letters as in `factors`; the papers' U is our `v`, transposed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import placement
from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.ranked import Rank, known_rank
from lowrank_jax.ranks import RankValue, only_rank

_ROUNDING = 16 * np.finfo(np.float64).eps


class Columns(nnx.Variable):
    """The order of a matrix's columns, pivots first: int32, `(*stack, o)`.

    Saved with the model's state, never trained.
    """


@dataclasses.dataclass(frozen=True)
class GaugeCost(LayerCost):
    """What a layer costs in the gauge-aligned form: r (i + o - r) numbers a matrix."""

    def form_params(self, rank: int) -> int:
        return super().form_params(rank) - rank**2

    def form_macs(self, rank: int) -> int:
        """Counts as the factored form, less the identity where the layer skips it."""
        return super().form_macs(rank) - rank**2 * self.spared_positions


class GaugeFactors(Factors):
    """A matrix `W (i, o) = u (i, r) · [identity, rest] (r, o)`, columns permuted.

    Made from factors by `from_factors`; runs in every layer as they do.

    Args:
      u: The pivot columns of W, `(*stack, i, r)`.
      rest: What the other columns are made of, `(*stack, r, o - r)`.
      columns: Which columns of W these are, pivots first, `(*stack, o)`.
    """

    form: ClassVar[str] = "gauge"
    rank_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    nested: ClassVar[bool] = False
    skips_identity: ClassVar[bool] = True
    rule_options: ClassVar[Mapping[str, Any]] = {}

    s = None
    middle = None

    def __init__(
        self,
        u: Float[Array, "*stack i r"],
        rest: Float[Array, "*stack r o-r"],
        columns: Int[Array, "*stack o"],
    ):
        *stack, _, rank = u.shape
        out_size = columns.shape[-1]
        if rest.shape != (*stack, rank, out_size - rank) or columns.ndim != u.ndim - 1:
            raise UserError(
                "GaugeFactors: u (*stack, i, r), rest (*stack, r, o - r) and columns"
                f" (*stack, o) must agree in stack, r and o, got {u.shape},"
                f" {rest.shape} and {columns.shape}. Make them with from_factors."
            )
        self.u = nnx.Param(u)
        self.rest = nnx.Param(rest)
        self.columns = Columns(columns)
        self.rank = Rank(known_rank(tuple(stack), rank))
        self.per_example = False

    @classmethod
    def from_factors(cls, factors: Factors) -> Self:
        """Turns factors into this form, at their allocated rank, all of which acts.

        The decomposition runs in float64 on the host, traced factors through a
        callback: in float32 an ill-conditioned factor would cost its digits. What is
        known stays where the factors are.

        Raises:
          UserError: Matrices of a stack have different ranks, there are more columns
            than the matrix has, the active rank is traced, or the factors are on a mesh
            with explicit axes.
        """
        if isinstance(factors, cls):
            return factors
        if factors.rank_is_traced:
            raise UserError(
                "the gauge-aligned form needs a known rank, got a traced one. Make the"
                " form outside of jit and of nnx.eval_shape, or keep the factored form."
            )
        active = np.asarray(factors.limits().active)
        if (active != factors.max_rank).any() or factors.max_rank > factors.out_size:
            raise UserError(
                "the gauge-aligned form needs one rank for all matrices of a layer, at"
                f" most {factors.out_size}, got {active.tolist()} of {factors.max_rank}"
                " allocated. Cut them to one rank, or keep the factored form."
            )
        u, v = factors.active_u(None), factors.active_v(None)
        if placement.is_explicit(u) or placement.is_explicit(v):
            raise UserError(
                "the gauge-aligned form orders columns anew at every call, which a mesh"
                " with explicit axes has no types for, got factors on one. Put them on"
                " a mesh with AxisType.Auto, or keep the factored form."
            )
        if any(isinstance(array, jax.core.Tracer) for array in (u, v)):
            shapes = _shapes(u, v)
            return cls(*jax.pure_callback(gauge_align, shapes, u, v))
        arrays = gauge_align(placement.to_host(u), placement.to_host(v))
        made = cls(*map(jnp.asarray, arrays))
        made._lie_as(factors)
        return made

    def _lie_as(self, factors: Factors) -> None:
        """Puts the arrays where those of factors are, in place."""
        left, right = map(placement.sharding_of, (factors.u, factors.v))
        placement.move(self.u, left)
        placement.move(self.rest, right)
        for variable in (self.columns, self.rank):
            placement.move(variable, placement.replicated(left))

    @classmethod
    def from_rule(  # type: ignore[override]  # options are the form's `rule_options`
        cls,
        matrix: Float[Array, "*stack i o"],
        max_rank: int,
        *,
        rngs: nnx.Rngs | None,
    ) -> Self:
        """Makes the form of the best product of this rank."""
        return cls.from_factors(Factors.from_matrix(matrix, max_rank))

    def rule(self) -> dict[str, Any]:
        return {"max_rank": self.max_rank, "form": self.form}

    def cost(self, layer_cost: LayerCost) -> LayerCost:
        values = {
            field.name: getattr(layer_cost, field.name)
            for field in dataclasses.fields(layer_cost)
        }
        return GaugeCost(**values)

    @property
    def out_size(self) -> int:
        return self.columns.shape[-1]

    @property
    def depth(self) -> int:
        return 2

    def arrays(
        self,
    ) -> tuple[Float[Array, "*stack i r"], None, Float[Array, "*stack r o"]]:
        return self.u[...], None, self.active_v(None)

    def active_u(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack i r"]:
        return self.u[...] if dtype is None else self.u[...].astype(dtype)

    def active_v(
        self, dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, "*stack r o"]:
        """Returns the second factor, its identity written out."""
        rest = self.rest[...] if dtype is None else self.rest[...].astype(dtype)
        identity = jnp.eye(self.max_rank, dtype=rest.dtype)
        identity = jnp.broadcast_to(identity, (*self.stack_shape, *identity.shape))
        return self._in_order(jnp.concatenate([identity, rest], axis=-1))

    def matrix(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*stack i o"]:
        matrix = self.expand(self.active_u(dtype), jnp.matmul, dtype)
        return placement.kept(matrix, placement.of_product(self.u, self.rest))

    def expand(
        self,
        hidden: Float[Array, "... r"],
        multiply: Callable[[Array, Array], Array],
        dtype: jax.typing.DTypeLike | None = None,
    ) -> Float[Array, "... o"]:
        rest = self.rest[...] if dtype is None else self.rest[...].astype(dtype)
        others = multiply(hidden, rest)
        pivots = hidden.astype(others.dtype)
        return self._in_order(jnp.concatenate([pivots, others], axis=-1))

    def _in_order(self, columns: Float[Array, "... o"]) -> Array:
        """Puts columns, pivots first, back where the matrix has them."""
        places = jnp.argsort(self.columns[...], axis=-1)
        stack = self.stack_shape
        between = [1] * (columns.ndim - places.ndim)
        places = places.reshape(*stack, *between, places.shape[-1])
        return jnp.take_along_axis(columns, places, axis=-1, mode="promise_in_bounds")

    def cut(self, rank: RankValue) -> None:
        self.set_rank(rank)

    def set_rank(self, rank: RankValue | Int[Array, "..."]) -> None:
        """Refuses every rank but its own, and traced ones, which may be others."""
        traced = isinstance(rank, jax.core.Tracer)
        if traced or np.any(np.asarray(rank) != self.max_rank):
            active = np.full(self.stack_shape, self.max_rank).tolist()
            raise UserError(only_rank(active, "a traced one" if traced else rank))
        super().set_rank(rank)

    def canonicalize(self) -> None:
        raise UserError(
            f"the gauge-aligned form (rank {self.max_rank}) must stay as it is: it has"
            " no order of columns, got canonicalize. Canonicalize the factored model"
            " it was made from."
        )


def gauge_align(
    u: Float[np.ndarray, "*stack i r"], v: Float[np.ndarray, "*stack r o"]
) -> tuple[
    Float[np.ndarray, "*stack i r"],
    Float[np.ndarray, "*stack r o-r"],
    Int[np.ndarray, "*stack o"],
]:
    """Computes `u`, `rest` and `columns` of `GaugeFactors` for each matrix of a stack.

    >>> u, rest, columns = gauge_align(np.array([[2.0]]), np.array([[1.0, 4.0, 2.0]]))
    >>> u.tolist(), rest.tolist(), columns.tolist()
    ([[8.0]], [[0.25, 0.5]], [1, 0, 2])
    """
    shapes = _shapes(u, v)
    results = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
    for index in np.ndindex(u.shape[:-2]):
        parts = _align_matrix(
            np.asarray(u[index], np.float64), np.asarray(v[index], np.float64)
        )
        for result, part in zip(results, parts, strict=True):
            result[index] = part
    u, rest, columns = results
    return u, rest, columns


def _shapes(u: Any, v: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    (*stack, _, rank), out_size = u.shape, v.shape[-1]
    return (
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((*stack, rank, out_size - rank), v.dtype),
        jax.ShapeDtypeStruct((*stack, out_size), jnp.int32),
    )


def _align_matrix(
    u: Float[np.ndarray, "i r"], v: Float[np.ndarray, "r o"]
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o-r"], Int[np.ndarray, " o"]]:
    rank = u.shape[-1]
    # with u = q R, the columns of R v have the geometry of those of W = u v, whatever
    # the condition of either factor, and there are only r rows of them
    core = np.linalg.qr(u, mode="r") @ v
    pivots, triangle = _pivoted_qr(core)
    others = np.setdiff1d(np.arange(v.shape[-1]), pivots)
    # rank-deficient matrices have fewer pivots than columns: any others fill them up,
    # and their rows of `rest` stay zero
    columns = np.concatenate([pivots, others]).astype(np.int32)
    rest = np.zeros((rank, v.shape[-1] - rank))
    found = len(pivots)
    rest[:found] = np.linalg.solve(
        np.triu(triangle[:, pivots]), triangle[:, columns[rank:]]
    )
    return u @ v[:, columns[:rank]], rest, columns


def _pivoted_qr(
    matrix: Float[np.ndarray, "r o"],
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, "k o"]]:
    """The pivots of a column-pivoted QR decomposition up to the numerical rank k, and
    its triangular factor with the columns where they were.

    Gram-Schmidt, orthogonalized twice, which is as stable as reflections are and reads
    the matrix once a step.
    """
    basis = np.zeros((0, matrix.shape[0]))
    pivots: list[int] = []
    norms = np.sum(np.square(matrix), axis=0)
    floor = norms.max(initial=0) * (max(matrix.shape) * _ROUNDING) ** 2
    exact = norms.max(initial=0)  # the largest norm when they were last computed
    for _ in range(min(matrix.shape)):
        if norms.max() < 1e-8 * exact:  # little is left of what was subtracted from
            left = matrix - basis.T @ (basis @ matrix)
            norms = np.sum(np.square(left), axis=0)
            norms[pivots] = -1
            exact = norms.max()
        pivot = int(np.argmax(norms))
        if norms[pivot] <= floor:
            break
        column = matrix[:, pivot]
        for _ in range(2):
            column = column - basis.T @ (basis @ column)
        basis = np.vstack([basis, column / np.linalg.norm(column)])
        pivots.append(pivot)
        norms = norms - np.square(basis[-1] @ matrix)
        norms[pivots] = -1
    return np.asarray(pivots, np.int32), basis @ matrix
