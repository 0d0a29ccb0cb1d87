"""A model's layers in one table: their forms, ranks, parameters, MACs and spectra."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax import linalg, placement
from lowrank_jax.cost import LayerCost
from lowrank_jax.counting import layer_costs
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankLayer, LowRankParam, twin_type
from lowrank_jax.paths import find_layers, find_own_matrices, param_sizes, walk
from lowrank_jax.ranks import largest


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer.

    Args:
      path: Its first path; the further ones share its parameters.
      type: Name of its class.
      form: "dense", the name of the factors' form ("factored" or another key of
        `forms.FORMS`), or "own" for a matrix that a module holds itself and that stays
        dense.
      rank: The active rank, the largest of a stack; None of a dense layer.
      max_rank: The allocated rank; None of a dense layer.
      params: Numbers that it stores, bias included.
      macs: MACs of one example as it stands, in the cheaper order; None where there
        was no example or nobody sees what the matrix is multiplied by.
      effective_rank: exp of the entropy of the singular values at the active rank (Roy
        and Vetterli, 2007), the mean of a stack; None where arrays are abstract.
    """

    path: str
    type: str
    form: str
    rank: int | None
    max_rank: int | None
    params: int
    macs: int | None
    effective_rank: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a model, and its totals; prints as a table.

    Args:
      rows: The layers by path.
      params: Numbers that all Params of the model store.
      macs: MACs of one example; None without one.
    """

    rows: tuple[Row, ...]
    params: int
    macs: int | None

    def __str__(self) -> str:
        in_rows = sum(row.params for row in self.rows)
        lines = [
            ("path", "type", "form", "rank", "params", "MACs", "effective rank"),
            *(_cells(row) for row in self.rows),
            ("other", "", "", "", f"{self.params - in_rows:,}", "", ""),
            ("total", "", "", "", f"{self.params:,}", _number(self.macs), ""),
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def summary(model: nnx.Module, *example: Any) -> Summary:
    """Returns a row for each layer that has, or can have, a low-rank form.

    Args:
      model: Any model, dense or low-rank.
      *example: Arguments for a batch of one example (arrays or `jax.ShapeDtypeStruct`),
        to count MACs on.

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [(".*", {"max_rank": 2})])
    >>> table = summary(model, jax.ShapeDtypeStruct((1, 8), "float32"))
    >>> table.params, table.macs, table.rows[0].form, table.rows[0].rank
    (28, 24, 'factored', 2)
    """
    sizes = param_sizes(model)
    counted: set[int] = set()
    costs = layer_costs(model, *example) if example else {}
    nodes: dict[str, tuple[Any, list[str]]] = {
        **find_layers(model),
        **find_own_matrices(model),
    }
    rows = []
    for path, (node, _) in sorted(nodes.items()):
        factors = node.factors if isinstance(node, LowRankLayer) else None
        own = {id(p) for _, p in walk(node) if isinstance(p, nnx.Param)} - counted
        counted |= own
        rows.append(
            Row(
                path,
                type(node).__name__,
                _form(node, factors),
                None if factors is None else largest(factors.limits().active),
                None if factors is None else factors.max_rank,
                sum(sizes[key] for key in own),
                _macs(node, costs.get(path)),
                _effective_rank(node),
            )
        )
    total = sum(row.macs or 0 for row in rows) if example else None
    return Summary(tuple(rows), sum(sizes.values()), total)


def _form(node: Any, factors: Factors | None) -> str:
    if factors is not None:
        return factors.form
    return "own" if isinstance(node, nnx.Param) else "dense"


def _macs(node: Any, cost: LayerCost | None) -> int | None:
    """Counts MACs at the active rank; None for what is not counted."""
    if cost is None or isinstance(node, LowRankParam):
        return None
    if isinstance(node, LowRankLayer):
        return cost.macs(node.factors.limits().active)
    return cost.dense_macs


def _effective_rank(node: Any) -> float | None:
    """Computes exp(H(s / sum s)) of the kernel's matrix, the mean over a stack."""
    arrays = [p.get_value() for _, p in walk(node) if isinstance(p, nnx.Param)]
    if any(isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) for x in arrays):
        return None
    if isinstance(node, LowRankLayer):
        factors = node.factors
        spectrum = linalg.singular_values(
            factors.active_u(None), None, factors.active_v(None)
        )
    else:
        matrix = _matrix(node)
        if matrix is None:
            return None
        spectrum = jnp.linalg.svd(placement.whole(matrix), compute_uv=False)
    ranks = linalg.effective_rank(placement.to_host(spectrum))
    return float(ranks.mean())


def _matrix(node: Any) -> jax.Array | None:
    """Returns the matrix of a dense layer or Param; None where it has none."""
    if isinstance(node, nnx.Param):
        return node.get_value()
    kind = twin_type(node)
    try:
        fold = kind.fold_of(node)
    except UserError:  # it has no low-rank form, such as a masked kernel
        return None
    return fold.to_matrix(getattr(node, kind.kernel_name)[...])


def _cells(row: Row) -> tuple[str, ...]:
    rank = "" if row.rank is None else f"{row.rank} of {row.max_rank}"
    spectrum = "" if row.effective_rank is None else f"{row.effective_rank:.1f}"
    return (
        row.path or "(root)",
        row.type,
        row.form,
        rank,
        f"{row.params:,}",
        _number(row.macs),
        spectrum,
    )


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
