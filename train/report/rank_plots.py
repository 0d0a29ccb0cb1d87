"""The picture of a cut: the rank of each layer, and what a search has scored."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import axes, figure

from lowrank_jax.ranks import Ranks, flatten_rank, name_of
from train.report.plots import COLOURS, FAINT, INK, MARKERS, decorate

_MOST = 60  # layers whose names are written

Scored = Sequence[tuple[float, float]]
"""What rank vectors cost, and their loss."""


def plot_cut(
    path: str | os.PathLike,
    before: Ranks,
    chosen: Mapping[str, Ranks],
    *,
    scored: Scored = (),
    costs: Mapping[str, float] | None = None,
    cost_name: str = "MACs",
) -> None:
    """Draws the ranks of layers before and after; beside them what was scored.

    Args:
      path: The PNG to write.
      before: Active rank of each layer; of a stack the mean is drawn.
      chosen: Ranks by the name of their size.
      scored: Cost and loss of rank vectors that a search has looked at.
      costs: What the chosen ones cost, to mark them among these.
      cost_name: What the cost is.
    """
    scored = [pair for pair in scored if np.isfinite(pair).all() and pair[0] > 0]
    drawing = figure.Figure(
        figsize=(11 if scored else 7, min(2 + 0.22 * len(before), 14)),
        dpi=150,
        layout="constrained",
    )
    panels = drawing.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _draw_ranks(panels[0], before, chosen)
    if scored:
        _draw_scored(panels[1], scored, costs or {}, cost_name)
    drawing.savefig(path, format="png", facecolor="white")


def _draw_ranks(panel: axes.Axes, before: Ranks, chosen: Mapping[str, Ranks]) -> None:
    """Bars to the left edge, the first layer at the top; one mark for each size."""
    places = np.arange(len(before))
    panel.barh(places, _means(before), height=0.7, color=FAINT, label="before the cut")
    for index, (name, ranks) in enumerate(chosen.items()):
        panel.plot(
            _means({path: ranks[path] for path in before}),
            places,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            markersize=5.5,
            label=name,
        )
    if len(before) <= _MOST:
        panel.set_yticks(places, [name_of(path) for path in before], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.set_xlabel("rank", color=INK)
    panel.legend(frameon=False, labelcolor=INK, fontsize=8)
    panel.tick_params(which="both", length=0, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_scored(
    panel: axes.Axes, scored: Scored, costs: Mapping[str, float], cost_name: str
) -> None:
    """A point for each rank vector, a line where a chosen one lies."""
    several = np.array(scored)
    panel.plot(*several.T, color="#999999", marker=".", linestyle="none", markersize=3)
    for index, (name, cost) in enumerate(costs.items()):
        panel.axvline(cost, color=COLOURS[index % len(COLOURS)], label=name, alpha=0.8)
    decorate(panel, cost_name, [*several[:, 0], *costs.values()])
    panel.set_ylabel("loss on held-out examples", color=INK)


def _means(ranks: Ranks) -> list[float]:
    return [float(np.mean(flatten_rank(rank) or [0])) for rank in ranks.values()]
