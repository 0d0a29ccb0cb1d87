"""What a finished run is worth: its model cut to several sizes, its baselines, its
pictures."""

from pathlib import Path
from typing import Any

from lowrank_jax.times import MERGED
from train import baselines, checkpoints, opening
from train.report import comparisons, curve_plots, logs, rank_plots, tables
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
    shown = [task.headline, *(["bleu"] if "bleu" in rows[0] else [])]
    names = ["size", *shown, "stored", "params", "macs"]
    print(f"\nTest {task.headline} of one trained model, each size a checkpoint:\n")
    print(tables.of_figures(rows, names, task))
    reason = baselines.misfit(run.config) if seeds > 1 else "--seeds is 1"
    if reason:
        logs.say(f"no baselines: {reason}")
        series = {baselines.NESTED: whole.sweep(FRACTIONS, translate=False)}
    else:
        series = baselines.compare(
            whole, seeds=seeds, fractions=FRACTIONS, alone=SIZES[1:]
        )
    frontier, ranks, training = (workdir / name for name in PICTURES)
    about = f"{run.data.name}, {run.data.sizes['test']:,} test examples"
    count = 1 if reason else seeds
    comparisons.show(series, task, frontier, about=about, seeds=count)
    first, *smaller = rows
    chosen = {f"{row['size']:g} of all ranks": row["ranks"] for row in smaller}
    rank_plots.plot_cut(ranks, first["ranks"], chosen)
    curve_plots.plot_course(workdir / "run", training)
    return series
