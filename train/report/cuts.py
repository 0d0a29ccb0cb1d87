"""What is said of a cut: its figures, its table, its picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lowrank_jax import counting
from lowrank_jax.ranks import Ranks
from train.report import base_plots, rank_plots, tables
from train.tasks import Task

check_suffix = base_plots.check_suffix


def figures(
    output: str | Path | None, cost: counting.ModelCost, ranks: Ranks
) -> dict[str, Any]:
    """Returns what a binary prints of a cut."""
    return {
        "output": None if output is None else str(output),
        "params": cost.params(ranks),
        "stored": cost.stored(ranks),
        "macs": cost.macs(ranks),
        "ranks": dict(ranks),
    }


def print_table(model: nnx.Module, task: Task, before: Ranks) -> None:
    """Prints the table of a cut model's layers, with their ranks before the cut."""
    print(tables.of_layers(model, task, before=before))


def draw(
    path: str | os.PathLike,
    cost: counting.ModelCost,
    before: Ranks,
    chosen: Mapping[str, Ranks],
    scored: Sequence[tuple[Ranks, float]],
    measure: str | None,
) -> None:
    """Draws what was chosen, and what a search has scored, see `rank_plots`.

    Args:
      path: The picture to write.
      cost: What the model costs.
      before: Its ranks.
      chosen: Ranks by the name of their size.
      scored: Rank vectors with minus their loss.
      measure: What the budget was of.
    """
    by_params = measure == "params"
    cost_of = cost.params if by_params else cost.macs
    rank_plots.plot_cut(
        path,
        before,
        chosen,
        scored=[(cost_of(ranks), -score) for ranks, score in scored],
        costs={name: cost_of(ranks) for name, ranks in chosen.items()},
        cost_name="parameters" if by_params else "MACs",
    )
