"""The picture of a cut: the rank of each layer, and what a search has scored."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import axes, figure

from lowrank_jax.ranks import Ranks, flatten_rank, name_of
from train.report import base_plots

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
      path: The picture to write, in the format that it ends in.
      before: Active rank of each layer; of a stack the mean is drawn.
      chosen: Ranks by the name of their size.
      scored: Cost and loss of rank vectors that a search has looked at.
      costs: What the chosen ones cost, to mark them among these.
      cost_name: What the cost is.
    """
    drawing = draw_cut(
        before, chosen, scored=scored, costs=costs or {}, cost_name=cost_name
    )
    base_plots.save(drawing, path)


def draw_cut(
    before: Ranks,
    chosen: Mapping[str, Ranks],
    *,
    scored: Scored,
    costs: Mapping[str, float],
    cost_name: str,
) -> figure.Figure:
    """Returns the picture of `plot_cut`."""
    scored = [pair for pair in scored if np.isfinite(pair).all() and pair[0] > 0]
    named = len(before) <= _MOST
    height = min(1.6 + (0.17 if named else 0.05) * len(before), 9)
    drawing = base_plots.new_figure(height)
    if scored:
        panels = drawing.subplots(1, 2, width_ratios=(1.2, 1))
        _draw_scored(panels[1], scored, costs, cost_name)
    else:
        panels = [drawing.subplots()]
    _draw_ranks(panels[0], before, chosen, named)
    base_plots.legend_above(drawing, panels[0], columns=4)
    return drawing


def _draw_ranks(
    panel: axes.Axes, before: Ranks, chosen: Mapping[str, Ranks], named: bool
) -> None:
    """Bars to the left edge, the first layer at the top; one mark for each size."""
    places = np.arange(len(before))
    panel.barh(places, _means(before), height=0.7, color="#D0D0D0", label="whole")
    for index, (name, ranks) in enumerate(chosen.items()):
        style = base_plots.line_style(index, index) | {"linestyle": "none"}
        panel.plot(
            _means({path: ranks[path] for path in before}),
            places,
            label=name,
            clip_on=False,  # rank 0 is on the edge
            **style,
        )
    if named:
        panel.set_yticks(places, [name_of(path) for path in before])
    else:
        panel.set_ylabel("layer", color=base_plots.INK, fontsize=base_plots.LETTERS)
    panel.set_ylim(len(before) - 0.4, -0.6)
    panel.set_xlim(left=0)
    panel.set_xlabel("rank", color=base_plots.INK, fontsize=base_plots.LETTERS)
    base_plots.tidy(panel)
    panel.grid(False, axis="y")
    panel.tick_params(axis="y", labelsize=base_plots.SMALL - 1)


def _draw_scored(
    panel: axes.Axes, scored: Scored, costs: Mapping[str, float], cost_name: str
) -> None:
    """A point for each rank vector, a line where a chosen one lies."""
    several = np.array(scored)
    panel.plot(*several.T, color="#999999", marker=".", linestyle="none", markersize=3)
    for index, (name, cost) in enumerate(costs.items()):
        style = base_plots.line_style(index, index)
        line = {key: style[key] for key in ("color", "linestyle")}
        panel.axvline(cost, label=name, alpha=0.8, **line)
    base_plots.cost_axis(panel, cost_name, [*several[:, 0], *costs.values()])
    panel.set_ylabel(
        "loss on held-out examples",
        color=base_plots.INK,
        fontsize=base_plots.LETTERS,
    )


def _means(ranks: Ranks) -> list[float]:
    return [float(np.mean(flatten_rank(rank) or [0])) for rank in ranks.values()]
