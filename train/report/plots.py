"""Figures for reports: a task's headline figure against what a model costs."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes, figure, ticker

from lowrank_jax.errors import raise_all

# Okabe and Ito's palette, told apart with every common colour blindness; markers and
# dashes repeat the difference for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_PANELS = {"params": "parameters", "macs": "MACs"}
INK, FAINT = "#333333", "#E3E3E3"


def plot_frontier(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike,
    *,
    headline: str,
    higher_is_better: bool,
    unit: str = "",
    marks: Mapping[str, tuple[int, int]] | None = None,
    costs: Sequence[str] = tuple(_PANELS),
) -> None:
    """Draws a figure against parameters and against MACs, one line per series.

    Args:
      series: Rows by series name; a row has the headline figure, "params", "macs" and
        may have "rank_fraction", which is written beside its point.
      path: The PNG to write.
      headline: Name of the figure, as in the rows.
      higher_is_better: Its direction, which the axis tells.
      unit: What the MACs are of, such as "example".
      marks: Numbers of the colour and of the marker of each series, so that what is
        alike looks alike; its own of each if not given.
      costs: Which of "params" and "macs" to draw it against.

    Raises:
      UserError: Nothing to draw, or a row without one of its figures.
    """
    _check(series, headline)
    # A Figure of its own (Agg for PNG): pyplot would keep it in global state.
    drawing = figure.Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    panels = drawing.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    labels = {**_PANELS, "macs": f"MACs per {unit}" if unit else _PANELS["macs"]}
    for panel, cost in zip(panels, costs, strict=True):
        for index, (name, rows) in enumerate(series.items()):
            points = sorted(rows, key=lambda row: row[cost])
            mark = marks[name] if marks is not None else (index, index)
            _draw(panel, mark, name, points, cost, headline, higher_is_better)
        decorate(
            panel, labels[cost], [row[cost] for rows in series.values() for row in rows]
        )
    direction = "higher" if higher_is_better else "lower"
    panels[0].set_ylabel(f"{headline} ({direction} is better)", color=INK)
    if len(series) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        drawing.legend(
            handles,
            names,
            loc="outside upper left",
            ncols=min(len(series), 4),
            frameon=False,
            labelcolor=INK,
        )
    drawing.savefig(path, format="png", facecolor="white")


def _check(series: Mapping[str, Sequence[Mapping[str, Any]]], headline: str) -> None:
    problems = [
        f"plot_frontier: {name}[{index}] must have {headline}, and params and macs"
        f" above 0, got {dict(row)}."
        " Give evaluated rows."
        for name, rows in series.items()
        for index, row in enumerate(rows)
        if row.get(headline) is None or not _costs_something(row)
    ]
    if not any(len(rows) for rows in series.values()):
        problems.append(
            "plot_frontier: series must hold at least one row, got none. Give some."
        )
    raise_all(problems)


def _costs_something(row: Mapping[str, Any]) -> bool:
    """Whether a logarithmic axis can show what it costs."""
    return all(row.get(cost, 0) > 0 for cost in _PANELS)


def _draw(
    panel: axes.Axes,
    mark: tuple[int, int],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    cost: str,
    headline: str,
    higher_is_better: bool,
) -> None:
    index, shape = mark
    colour = COLOURS[index % len(COLOURS)]
    panel.plot(
        [row[cost] for row in rows],
        [row[headline] for row in rows],
        color=colour,
        marker=MARKERS[shape % len(MARKERS)],
        linestyle=_DASHES[shape % len(_DASHES)],
        linewidth=1.8,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.9,
        label=name,
    )
    # A frontier rises (or falls): above to the left and below to the right (or the
    # other way round) no line is crossed.
    above = index % 2 == 0
    left = above == higher_is_better
    for row in rows:
        if row.get("rank_fraction") is not None:
            panel.annotate(
                f"{row['rank_fraction']:.3g}",
                (row[cost], row[headline]),
                xytext=(-4 if left else 4, 5 if above else -5),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom" if above else "top",
                fontsize=8,
                color=colour,
            )


def decorate(panel: axes.Axes, label: str, costs: Sequence[float]) -> None:
    """Gives a panel a logarithmic axis of costs, all above 0."""
    panel.set_xscale("log")
    panel.margins(x=0.11, y=0.14)
    panel.xaxis.set_major_locator(_ticks(max(costs) / min(costs)))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_xlabel(label, color=INK)
    panel.grid(True, color=FAINT, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", length=0, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#BBBBBB")


def _ticks(ratio: float) -> ticker.Locator:
    """Powers of ten alone would leave a narrow axis with one tick or none."""
    if 1 < ratio < 4:
        return ticker.MaxNLocator(4, steps=[1, 2, 5, 10])
    subs = (1.0, 2.0, 5.0) if ratio < 50 else (1.0,)
    return ticker.LogLocator(subs=subs, numticks=12)
