"""The frontier as a picture: a task's headline figure against what a model costs."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import axes, figure

from lowrank_jax.errors import raise_all
from train.report import base_plots

COSTS = {
    "params": "parameters in the cheapest form",
    "stored": "parameters stored",
    "macs": "MACs",
}
"""What a figure is drawn against, by the name that it has in rows."""
check_suffix = base_plots.check_suffix
_MOST_WITH_FRACTIONS = 3  # lines that have room for a fraction beside each point

Row = Mapping[str, Any]


class Point(NamedTuple):
    """A size, over all runs of it.

    Args:
      cost: Its cost, the mean.
      least: Of the runs' figures.
      mean: Of the runs' figures.
      greatest: Of the runs' figures.
      fraction: Of the ranks, if it is one.
    """

    cost: float
    least: float
    mean: float
    greatest: float
    fraction: float | None


def plot_frontier(
    series: Mapping[str, Sequence[Row]], path: str | os.PathLike, **how: Any
) -> None:
    """Writes the picture of `draw_frontier`.

    Args:
      series: As of `draw_frontier`.
      path: The picture to write, in the format that it ends in (`base_plots.SUFFIXES`).
      **how: The other arguments of `draw_frontier`.

    Raises:
      UserError: Nothing to draw, or a row without one of its figures.
    """
    base_plots.save(draw_frontier(series, **how), path)


def draw_frontier(
    series: Mapping[str, Sequence[Row]],
    *,
    headline: str,
    higher_is_better: bool,
    unit: str = "",
    marks: Mapping[str, tuple[int, int]] | None = None,
    costs: Sequence[str] = ("params", "macs"),
    note: str = "",
) -> figure.Figure:
    """Draws a figure against what models cost, one line per series.

    Where a series has several rows of one size, as of several seeds, its line goes
    through their mean, in a band from the least to the greatest.

    Args:
      series: Rows by series name; a row has the headline figure and what it costs. Rows
        of one "rank_fraction", or without it of one cost, are of one size.
      headline: Name of the figure, as in the rows.
      higher_is_better: Its direction, which the axis tells.
      unit: What the MACs are of, such as "example".
      marks: Numbers of the colour and of the marker of each series, so that what is
        alike looks alike; its own of each if not given.
      costs: What to draw it against, a panel each, of `COSTS`.
      note: What stands below the picture.

    Raises:
      UserError: Nothing to draw, or a row without one of its figures.
    """
    _check(series, headline, costs)
    names = note.count("\n") + 1 if note else 0
    drawing = base_plots.new_figure(3.3 + 0.14 * names + 0.08 * len(series))
    panels = drawing.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    fractions = len(series) <= _MOST_WITH_FRACTIONS
    for panel, cost in zip(panels, costs, strict=True):
        for index, (name, rows) in enumerate(series.items()):
            points = points_of(rows, cost, headline)
            mark = marks[name] if marks is not None else (index, index)
            _draw(panel, mark, name, points)
            if fractions:
                _write_fractions(panel, mark[0], points, higher_is_better)
        per_unit = f" per {unit}" if unit and cost == "macs" else ""
        label = COSTS[cost] + per_unit
        of_all = [row[cost] for rows in series.values() for row in rows]
        base_plots.cost_axis(panel, label, of_all)
        if panel.texts:
            panel.margins(x=0.18)  # the outer ones stand beside their points
    direction = "higher" if higher_is_better else "lower"
    panels[0].set_ylabel(
        f"{headline} ({direction} is better)",
        color=base_plots.INK,
        fontsize=base_plots.LETTERS,
    )
    if len(series) > 1:
        base_plots.legend_above(drawing, panels[0])
    if note:
        base_plots.note_below(drawing, note)
    return drawing


def points_of(rows: Sequence[Row], cost: str, headline: str) -> list[Point]:
    """Returns a point for each size, by its cost."""
    sizes: dict[Any, list[Row]] = {}
    for row in rows:
        fraction = row.get("rank_fraction")
        size = ("costs", row[cost]) if fraction is None else ("fraction", fraction)
        sizes.setdefault(size, []).append(row)
    points = []
    for same in sizes.values():
        figures = [row[headline] for row in same]
        points.append(
            Point(
                sum(row[cost] for row in same) / len(same),
                min(figures),
                sum(figures) / len(figures),
                max(figures),
                same[0].get("rank_fraction"),
            )
        )
    return sorted(points, key=lambda point: point.cost)


def _check(
    series: Mapping[str, Sequence[Row]], headline: str, costs: Sequence[str]
) -> None:
    """Refuses what a logarithmic axis cannot show."""
    names = " and ".join(costs)
    problems = [
        f"plot_frontier: {name}[{index}] must have {headline}, and {names} above 0, got"
        f" {dict(row)}. Give evaluated rows."
        for name, rows in series.items()
        for index, row in enumerate(rows)
        if row.get(headline) is None or not all(row.get(cost, 0) > 0 for cost in costs)
    ]
    if not any(len(rows) for rows in series.values()):
        problems.append(
            "plot_frontier: series must hold at least one row, got none. Give some."
        )
    raise_all(problems)


def _draw(
    panel: axes.Axes, mark: tuple[int, int], name: str, points: Sequence[Point]
) -> None:
    """Draws a line through the means, and a band where runs differ."""
    style = base_plots.line_style(*mark)
    at = [point.cost for point in points]
    least = [point.least for point in points]
    greatest = [point.greatest for point in points]
    if least != greatest:
        band = {"color": style["color"], "alpha": 0.22, "linewidth": 0}
        panel.fill_between(at, least, greatest, **band)
    panel.plot(at, [point.mean for point in points], label=name, **style)


def _write_fractions(
    panel: axes.Axes, index: int, points: Sequence[Point], higher_is_better: bool
) -> None:
    """Writes fractions beside the points, above the lines of even numbers.

    A frontier rises (or falls): above to the left and below to the right (or the other
    way round) no line is crossed.
    """
    above = index % 2 == 0
    left = above == higher_is_better
    for point in points:
        if point.fraction is not None:
            panel.annotate(
                f"{point.fraction:.3g}",
                (point.cost, point.mean),
                xytext=(-4 if left else 4, 5 if above else -5),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom" if above else "top",
                fontsize=base_plots.SMALL - 1,
                color=base_plots.COLOURS[index % len(base_plots.COLOURS)],
            )
