"""The tables of the binaries, which say below them what they count."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from lowrank_jax.ranks import Ranks
from lowrank_jax.summary import NOTE, summary
from train.report import logs
from train.tasks import Task

_HEADERS = {"params": "cheapest", "macs": "MACs"}
"""Columns whose name in a row of figures is another one."""


def of_layers(model: nnx.Module, task: Task, *, before: Ranks | None = None) -> str:
    """Returns a row for each layer, as `lowrank_jax.summary` prints it.

    Args:
      model: The model; it may be without arrays.
      task: What it is for.
      before: Its ranks before a cut.
    """
    table = summary(model, *task.example, spectra=False)
    return table.table(before=before, unit=task.unit)


def of_figures(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], task: Task
) -> str:
    """Returns a row for each size, "params" and "macs" under the names of `of_layers`.

    Args:
      rows: Figures.
      names: Which of them.
      task: What they are of.
    """
    headers = [_HEADERS.get(name, name) for name in names]
    table = logs.table(headers, [[row[name] for name in names] for row in rows])
    return f"{table}\n{NOTE.format(unit=task.unit)}"
