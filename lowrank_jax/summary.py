"""A model's layers in one table: their forms, ranks, numbers, MACs and spectra."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax import linalg, placement
from lowrank_jax.cost import LayerCost
from lowrank_jax.counting import layer_cost, layer_costs
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankLayer, LowRankParam, twin_type
from lowrank_jax.paths import find_layers, find_own_matrices, param_sizes, walk
from lowrank_jax.ranks import largest

NOTE = (
    "stored: parameters in the checkpoint; cheapest: of each layer as it is or merged,"
    "\nwhichever has fewer; MACs of one {unit}"
)
"""What the columns of numbers count."""


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
      stored: Numbers in its arrays and so in a checkpoint, bias and all allocated ranks
        included.
      cheapest: Numbers at the active rank in the smaller of its form and the dense one,
        bias included; "params" in what the binaries print.
      dense: Numbers of its dense twin, bias included.
      macs: MACs of one example as it stands, in the cheaper order; None where there
        was no example or nobody sees what the matrix is multiplied by.
      dense_macs: MACs of its dense twin; None as `macs`.
      effective_rank: exp of the entropy of the singular values at the active rank (Roy
        and Vetterli, 2007), the mean of a stack; None where arrays are
        abstract, or it was not asked for.
    """

    path: str
    type: str
    form: str
    rank: int | None
    max_rank: int | None
    stored: int
    cheapest: int
    dense: int
    macs: int | None
    dense_macs: int | None
    effective_rank: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a model, and its totals; prints as a table.

    Args:
      rows: The layers by path.
      stored: Numbers that all Params of the model hold.
      cheapest: The same with each layer in the smaller of its forms.
      dense: The numbers of the dense twin of the model.
      macs: MACs of one example; None without one.
      dense_macs: MACs of the dense twin; None without an example.
    """

    rows: tuple[Row, ...]
    stored: int
    cheapest: int
    dense: int
    macs: int | None
    dense_macs: int | None

    def __str__(self) -> str:
        return self.table()

    def table(
        self, *, before: Mapping[str, Any] | None = None, unit: str = "example"
    ) -> str:
        """Returns the rows and totals as text, and below it what the numbers count.

        Columns of which nothing is known are left out.

        Args:
          before: Ranks before a cut, which are written beside those after it.
          unit: What MACs are of.
        """
        numbers = ("stored", "cheapest", "dense", "macs", "dense_macs")
        rows = [_cells(row, before or {}) for row in self.rows]
        total = [getattr(self, name) for name in numbers]
        other = [
            None if of_all is None else of_all - _sum(self.rows, name)
            for name, of_all in zip(numbers, total, strict=True)
        ]
        shares = [
            f"{value / whole:.0%}" if value is not None and whole else ""
            for value, whole in zip(total, self._wholes(), strict=True)
        ]
        lines = [
            ("path", "type", "form", "rank", "stored", "cheapest", "dense", "MACs")
            + ("dense MACs", "effective rank"),
            *rows,
            ("other", "", "", "", *map(_number, other), ""),
            ("total", "", "", "", *map(_number, total), ""),
            ("of dense", "", "", "", *shares, ""),
        ]
        return f"{_aligned(lines)}\n{NOTE.format(unit=unit)}"

    def _wholes(self) -> tuple[int | None, ...]:
        """What each total is a share of."""
        return (self.dense,) * 3 + (self.dense_macs,) * 2


def summary(model: nnx.Module, *example: Any, spectra: bool = True) -> Summary:
    """Returns a row for each layer that has, or can have, a low-rank form.

    Args:
      model: Any model, dense or low-rank.
      *example: Arguments for a batch of one example (arrays or `jax.ShapeDtypeStruct`),
        to count MACs on.
      spectra: Whether to compute effective ranks, which takes an SVD of each layer.

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [(".*", {"max_rank": 3})])
    >>> table = summary(model, jax.ShapeDtypeStruct((1, 8), "float32"))
    >>> table.stored, table.cheapest, table.dense, table.macs, table.rows[0].form
    (40, 36, 36, 32, 'factored')
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
        own = _params_of(node) - counted
        counted |= own
        stored = sum(sizes[key] for key in own)
        active_rank: Any = None if factors is None else factors.limits().active
        cheapest = dense = stored
        if factors is not None and own >= _params_of(factors):
            cost = costs.get(path) or layer_cost(node)
            beside = stored - sum(sizes[key] for key in _params_of(factors))
            cheapest = beside + cost.params(active_rank)
            dense = beside + cost.dense_params
        macs, dense_macs = _macs(node, costs.get(path))
        rows.append(
            Row(
                path,
                type(node).__name__,
                _form(node, factors),
                None if factors is None else largest(active_rank),
                None if factors is None else factors.max_rank,
                stored,
                cheapest,
                dense,
                macs,
                dense_macs,
                _effective_rank(node) if spectra else None,
            )
        )
    everything = sum(sizes.values())
    spared = [everything - _sum(rows, "stored") + _sum(rows, name) for name in _SIZES]
    worked = [_sum(rows, name) if example else None for name in ("macs", "dense_macs")]
    return Summary(tuple(rows), everything, *spared, *worked)


_SIZES = ("cheapest", "dense")


def _sum(rows: Iterable[Row], name: str) -> int:
    return sum(getattr(row, name) or 0 for row in rows)


def _params_of(node: Any) -> set[int]:
    """The `id` of each Param in a node."""
    return {id(param) for _, param in walk(node) if isinstance(param, nnx.Param)}


def _form(node: Any, factors: Factors | None) -> str:
    if factors is not None:
        return factors.form
    return "own" if isinstance(node, nnx.Param) else "dense"


def _macs(node: Any, cost: LayerCost | None) -> tuple[int | None, int | None]:
    """Counts MACs at the active rank and when dense; None for what is not counted."""
    if cost is None or isinstance(node, LowRankParam):
        return None, None
    if isinstance(node, LowRankLayer):
        return cost.macs(node.factors.limits().active), cost.dense_macs
    return cost.dense_macs, cost.dense_macs


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


def _cells(row: Row, before: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands in a row of the table."""
    rank = "" if row.rank is None else f"{row.rank} of {row.max_rank}"
    if row.path in before:
        after = "merged" if row.rank is None else str(row.rank)
        rank = f"{largest(before[row.path])} -> {after}"
    numbers = (row.stored, row.cheapest, row.dense, row.macs, row.dense_macs)
    spectrum = "" if row.effective_rank is None else f"{row.effective_rank:.1f}"
    path = row.path or "(root)"
    return (path, row.type, row.form, rank, *map(_number, numbers), spectrum)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells as text, without the columns that are empty below their names."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    texts = {"path", "type", "form", "rank"}
    padded = [
        [
            cell.ljust(width) if column[0] in texts else cell.rjust(width)
            for cell in column
        ]
        for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
