"""Series of models side by side: their table, what it shows, and their picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure

from train.report import base_plots, logs, plots, tables
from train.tasks import Task

Row = Mapping[str, Any]
Series = Mapping[str, Sequence[Row]]
"""Rows by name: the figures of each seed at each size, its "rank_fraction"."""


def sizes_of(rows: Sequence[Row], headline: str) -> dict[float, plots.Point]:
    """Returns the least, the mean and the greatest of the seeds for each size."""
    points = plots.points_of(rows, "params", headline)
    return {point.fraction: point for point in reversed(points)}


def table(series: Series, task: Task) -> str:
    """Returns a row for each size: what it costs, and the figure of each series."""
    by_series = {name: sizes_of(rows, task.headline) for name, rows in series.items()}
    costs = {
        row["rank_fraction"]: (row["params"], row["macs"])
        for rows in series.values()
        for row in rows
    }
    cells = [
        [f"{fraction:g}", *costs[fraction]]
        + [_span(points.get(fraction)) for points in by_series.values()]
        for fraction in sorted(costs, reverse=True)
    ]
    return logs.table(["size", "cheapest", "MACs", *series], cells)


def _span(point: plots.Point | None) -> str:
    if point is None:
        return "-"
    if point.least == point.greatest:
        return f"{point.mean:.4g}"
    return f"{point.mean:.4g} ({point.least:.4g} to {point.greatest:.4g})"


def findings(series: Series, task: Task) -> list[str]:
    """Says how the first series compares with each other one, and no more than all
    seeds show: where every seed of the one is better than every seed of the other."""
    (name, rows), *others = series.items()
    ours, lines = sizes_of(rows, task.headline), []
    for other, their_rows in others:
        found: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        theirs = sizes_of(their_rows, task.headline)
        for fraction, point in theirs.items():
            verdict = _verdict(ours[fraction], point, task.higher_is_better)
            gap = abs(ours[fraction].mean - point.mean)
            found[verdict].append(f"{fraction:g} (by {round(gap, 9):.2g})")
        parts = [f"{word} at {', '.join(at)}" for word, at in found.items() if at]
        lines.append(f"{name}, against {other}: {'; '.join(parts)}.")
    return lines


def _verdict(ours: plots.Point, theirs: plots.Point, higher_is_better: bool) -> str:
    above, below = ours.least > theirs.greatest, ours.greatest < theirs.least
    if not above and not below:
        return "not told apart"
    return "better" if above == higher_is_better else "worse"


def print_sizes(rows: Sequence[Row], task: Task) -> None:
    """Prints the figures of a model's sizes, each from its own checkpoint."""
    shown = [task.headline, *(["bleu"] if "bleu" in rows[0] else [])]
    names = ["size", *shown, "stored", "params", "macs"]
    print(f"\nTest {task.headline} of one trained model, each size a checkpoint:\n")
    print(tables.of_figures(rows, names, task))


def show(series: Series, task: Task, picture: str | os.PathLike, *, about: str) -> None:
    """Prints the table and what it shows, and draws the picture.

    Args:
      series: What to show; findings are of the first against the others.
      task: What the figures are of.
      picture: The picture to write.
      about: What the models were judged on.
    """
    seeds = len({row["seed"] for rows in series.values() for row in rows})
    band = f"mean of {seeds} seeds, band from least to greatest"
    note = f"{about}, {band if seeds > 1 else 'one seed'}"
    print(f"\n{task.headline} at fractions of all ranks; {note}:\n")
    print(table(series, task))
    print(tables.NOTE.format(unit=task.unit))
    for line in findings(series, task):
        print(line)
    base_plots.save(picture_of(series, task, note), picture)


def picture_of(series: Series, task: Task, note: str) -> figure.Figure:
    """Returns the frontiers of all series, with a note below them.

    A size is stored in its cheapest form: factored, or merged where that is smaller.
    """
    return plots.draw_frontier(
        {name: [_stored(row) for row in rows] for name, rows in series.items()},
        headline=task.headline,
        higher_is_better=task.higher_is_better,
        unit=task.unit,
        costs=("stored", "macs"),
        note=note,
    )


def _stored(row: Row) -> Row:
    """A row as it is stored when it is cut, and without its fraction: those of three
    series would lie on one another."""
    kept = {key: value for key, value in row.items() if key != "rank_fraction"}
    return {**kept, "stored": row["params"]}
