"""What is said of a cut: its figures, its table, its picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax import counting
from lowrank_jax.ranks import Ranks
from train.report import logs, rank_plots


def figures(
    output: str | Path | None, cost: counting.ModelCost, ranks: Ranks
) -> dict[str, Any]:
    """Returns what a binary prints of a cut."""
    return {
        "output": None if output is None else str(output),
        "params": cost.params(ranks),
        "macs": cost.macs(ranks),
        "ranks": dict(ranks),
    }


def print_table(
    cost: counting.ModelCost,
    before: Ranks,
    after_cost: counting.ModelCost,
    after: Ranks,
) -> None:
    """Prints ranks, parameters and MACs of each layer before and after; of one that is
    merged its dense kernel's."""
    rows = []
    for path, layer in cost.layers.items():
        old, new = before[path], after.get(path, "merged")
        cut = [layer.dense_params, layer.dense_macs]
        if path in after:
            now = after_cost.layers[path]
            cut = [now.params(new), now.macs(new)]
        rows.append(
            [path, str(old), str(new), layer.params(old), cut[0]]
            + [layer.macs(old), cut[1]]
        )
    total = ["all layers", "", "", cost.params(before), after_cost.params(after)]
    rows.append([*total, cost.macs(before), after_cost.macs(after)])
    headers = ["path", "rank", "cut to", "params", "cut to", "MACs", "cut to"]
    print(logs.table(headers, rows))


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
      path: The PNG to write.
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
