"""What every picture shares: colours, sizes that stay readable in print, files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import axes, figure, ticker

from lowrank_jax.errors import UserError

# Okabe and Ito's palette, told apart with every common colour blindness; markers and
# dashes repeat the difference for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#E3E3E3"
WIDTH = 6.3
"""Inches; letters of 10 points are 6 points high where it is printed 100 mm wide."""
LETTERS, SMALL = 10, 8.5
SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(height: float, *, width: float = WIDTH) -> figure.Figure:
    """Makes an empty figure of some inches.

    It is one of its own: pyplot would keep it in global state.
    """
    return figure.Figure(figsize=(width, height), dpi=200, layout="constrained")


def check_suffix(path: str | os.PathLike) -> None:
    """Raises UserError where no picture has such a name."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"must end in {', '.join(SUFFIXES)}, got {os.fspath(path)!r}. Rename it."
        )


def save(drawing: figure.Figure, path: str | os.PathLike) -> None:
    """Writes a picture in the format that its name ends in."""
    check_suffix(path)
    suffix = Path(path).suffix.lower().lstrip(".")
    drawing.savefig(path, format=suffix, facecolor="white")


def line_style(colour: int, shape: int) -> dict[str, Any]:
    """Returns how a line looks, by the numbers of its colour and of its shape."""
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "marker": MARKERS[shape % len(MARKERS)],
        "linestyle": DASHES[shape % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
    }


def tidy(panel: axes.Axes) -> None:
    """Takes away what holds no data."""
    panel.grid(True, color=FAINT, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", length=0, colors=INK, labelsize=SMALL)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#BBBBBB")


def cost_axis(panel: axes.Axes, label: str, costs: Sequence[float]) -> None:
    """Gives a panel a logarithmic axis of costs, all above 0."""
    panel.set_xscale("log")
    panel.margins(x=0.08, y=0.1)
    panel.xaxis.set_major_locator(_ticks(max(costs) / min(costs)))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_xlabel(label, color=INK, fontsize=LETTERS)
    tidy(panel)


def _ticks(ratio: float) -> ticker.Locator:
    """Powers of ten alone would leave a narrow axis with one tick or none."""
    if 1 < ratio < 4:
        return ticker.MaxNLocator(4, steps=[1, 2, 5, 10])
    subs = (1.0, 2.0, 3.0, 5.0) if ratio < 8 else (1.0, 2.0, 5.0)
    subs = subs if ratio < 50 else (1.0,)
    return ticker.LogLocator(subs=subs, numticks=12)


def legend_above(drawing: figure.Figure, panel: axes.Axes, *, columns: int = 3) -> None:
    """Names a panel's lines above all panels, where the names cover no data."""
    handles, names = panel.get_legend_handles_labels()
    drawing.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=min(len(names), columns if max(map(len, names)) < 24 else 2),
        frameon=False,
        labelcolor=INK,
        fontsize=SMALL,
        columnspacing=1.4,
    )


def note_below(drawing: figure.Figure, note: str) -> None:
    """Writes what a picture is of below it."""
    drawing.supxlabel(note, fontsize=SMALL - 1, color=INK, x=0.01, ha="left")
