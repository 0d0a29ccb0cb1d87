"""What a sweep found: one table and one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import jobs
from launch.jobs import Sweep
from lowrank_jax import checkpoint
from lowrank_jax.errors import MissingFile
from train import folders
from train.model import build_task
from train.report import logs, plots

Row = dict[str, Any]

SEED = "seed"
"""What a grid gives that makes no line of its own: jobs that differ in it alone are one
line, in a band from the least to the greatest."""


class Headline(NamedTuple):
    """The figure that jobs are judged by.

    Args:
      name: Its name.
      higher_is_better: Its direction.
    """

    name: str
    higher_is_better: bool


def rows(sweep: Sweep) -> list[Row]:
    """Returns a row for each job that is done and each fraction: what the grids gave
    the job, then its figures."""
    found = []
    for name, job in sweep.jobs.items():
        if sweep.state(name) != jobs.DONE:
            continue
        result = sweep.result(name)
        for figures in result["frontier"] or [{}]:
            figures = {key: x for key, x in figures.items() if key != "ranks"}
            found.append({"job": name, **job.values, "step": result["step"], **figures})
    return found


def headline(sweep: Sweep) -> Headline | None:
    """Returns the headline of the jobs' task as a checkpoint says; None without one."""
    for name in sweep.jobs:
        if sweep.state(name) != jobs.DONE:
            continue
        try:
            saved = checkpoint.open_checkpoint(sweep.job_folder(name) / "workdir")
        except MissingFile:  # another program, or it was cleared away
            continue
        config, facts = saved.metadata["config"], saved.metadata["facts"]
        task = build_task(config, facts, allow_imports=None)
        return Headline(task.headline, task.higher_is_better)
    return None


def table(found: Sequence[Row]) -> str:
    """Returns the rows as text; the job's name is in its values."""
    names = list(dict.fromkeys(name for row in found for name in row))
    headers = [name for name in names if name != "job"]
    return logs.table(headers, [[row.get(key) for key in headers] for row in found])


def series_of(
    sweep: Sweep, found: Sequence[Row], judged_by: Headline
) -> tuple[dict[str, list[Row]], dict[str, tuple[int, int]]]:
    """Returns the rows of each line and the numbers of its colour and its marker, by
    what the grids gave its jobs, but for `SEED`."""
    series: dict[str, list[Row]] = {}
    marks: dict[str, tuple[int, int]] = {}
    firsts, others = _numbers(sweep, slice(0, 1)), _numbers(sweep, slice(1, None))
    for row in found:
        costs = min(row.get("params", 0), row.get("macs", 0))
        if row.get(judged_by.name) is None or costs <= 0:
            continue
        values = _without_seed(sweep.jobs[row["job"]].values)
        label = ", ".join(f"{key}={value}" for key, value in values.items())
        label = label or "all seeds"
        marks[label] = firsts[row["job"]], others[row["job"]]
        series.setdefault(label, []).append(row)
    return series, marks


def draw(sweep: Sweep, found: Sequence[Row], judged_by: Headline, path: Path) -> bool:
    """Draws the headline against the costs: a line for each job, or for those that
    differ in `SEED` alone, and a point for each fraction; the first grid's value as
    colour and the others' as marker.

    Args:
      sweep: The sweep.
      found: All rows.
      judged_by: What to draw.
      path: The picture to write.

    Returns:
      Whether there was anything to draw.
    """
    series, marks = series_of(sweep, found, judged_by)
    if not series:
        return False
    plots.plot_frontier(
        series,
        path,
        headline=judged_by.name,
        higher_is_better=judged_by.higher_is_better,
        marks=marks,
    )
    return True


def _numbers(sweep: Sweep, part: slice) -> dict[str, int]:
    """Numbers the jobs by what a part of the grids gives them."""
    values = {
        name: tuple(_without_seed(job.values).values())[part]
        for name, job in sweep.jobs.items()
    }
    numbers = {value: n for n, value in enumerate(dict.fromkeys(values.values()))}
    return {name: numbers[value] for name, value in values.items()}


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != SEED}


def gather(sweep: Sweep) -> Mapping[str, Any]:
    """Writes and prints what the jobs that are done found; says what the others do.

    Returns:
      What the sweep's last line of JSON says.
    """
    states = {name: sweep.state(name) for name in sweep.jobs}
    found, judged_by = rows(sweep), headline(sweep)
    summary = {"sweep": str(sweep.folder), "jobs": states, "picture": None}
    lines = [table(found)] if found else []
    for name, state in states.items():
        if state == jobs.FAILED:
            lines.append(f"{name}: failed: {sweep.failure(name)}")
        elif state != jobs.DONE:
            lines.append(f"{name}: {state}")
    text = "\n".join(lines)
    print(text)
    with jobs.alone(sweep.folder):
        folders.write_atomically(sweep.folder / "table.txt", text + "\n")
        results = json.dumps({**summary, "rows": found}, indent=1)
        folders.write_atomically(sweep.folder / "results.json", results)
        picture = sweep.folder / "sweep.png"
        if judged_by is not None and draw(sweep, found, judged_by, picture):
            print(f"picture: {picture}")
            summary["picture"] = str(picture)
    return summary
