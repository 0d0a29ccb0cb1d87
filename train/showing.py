"""What a finished run is worth: its model cut to several sizes, its baselines, its
pictures."""

from pathlib import Path
from typing import Any

from lowrank_jax.times import MERGED
from train import baselines, checkpoints, opening
from train.report import comparisons, curve_plots, rank_plots
from train.timing import Timing

SIZES = (1.0, 0.25, 0.125, 0.0625)
"""Fractions of all ranks that get a checkpoint; the whole is written merged."""
FRACTIONS = (1.0, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
"""Those at which models are compared."""
PICTURES = ("frontier.png", "ranks.png", "training.png")


def folder_of(size: float) -> str:
    """Returns the name of the folder of a size's checkpoint."""
    return f"size_{size:g}"


def cut(run: Path, workdir: Path) -> list[dict[str, Any]]:
    """Writes a checkpoint of each size; returns its figures, from that checkpoint."""
    rows = []
    for size in SIZES:
        output = workdir / folder_of(size)
        selector = {"name": "rank_fraction", "args": {"value": size}}
        timing = Timing(form=MERGED) if size == 1 else None
        written = checkpoints.truncate_checkpoint(run, output, selector, timing=timing)
        figures = opening.open_model(output).figures()
        rows.append({"size": size, **figures, "ranks": written["ranks"]})
    return rows


def show(
    whole: opening.Opened, rows: list[dict[str, Any]], workdir: Path, *, seeds: int
) -> dict[str, Any]:
    """Prints the table, trains the baselines, draws; returns the compared figures.

    Args:
      whole: The run's model.
      rows: Of `cut`.
      workdir: Folder of the pictures.
      seeds: How many seeds to compare; 1 for the run alone, without baselines.
    """
    run, task = whole.run, whole.run.task
    comparisons.print_sizes(rows, task)
    series = baselines.compare(whole, seeds=seeds, fractions=FRACTIONS, alone=SIZES[1:])
    frontier, ranks, training = (workdir / name for name in PICTURES)
    about = f"{run.data.name}, {run.data.sizes['test']:,} test examples"
    comparisons.show(series, task, frontier, about=about)
    first, *smaller = rows
    chosen = {f"{row['size']:g} of all ranks": row["ranks"] for row in smaller}
    rank_plots.plot_cut(ranks, first["ranks"], chosen)
    curve_plots.plot_course(workdir / "run", training)
    return series
