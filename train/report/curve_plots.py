"""The course of a run as a picture: loss, headline figure, parameters allocated.

All of it is in the run's own files: metrics.jsonl, config.json and status.json.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import axes, figure, ticker

from lowrank_jax.errors import MissingFile, UserError
from train.report import base_plots, status
from train.report.trackers import METRICS

SHRINK = "shrink"
_LEAST_APART = 0.08
"""Share of the steps between two events that are both named."""


class Course(NamedTuple):
    """What a run has written of itself.

    Args:
      lines: The metrics of each step that has some, in order.
      phases: The names of its phases.
      headline: The figure that it is judged by.
    """

    lines: Sequence[Mapping[str, Any]]
    phases: Sequence[str]
    headline: str

    def of(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of a metric."""
        pairs = [(x["step"], x[name]) for x in self.lines if x.get(name) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def fractions(self) -> list[str]:
        """Returns the sizes that were evaluated, the largest first."""
        names = {name for line in self.lines for name in line}
        end = f"/{self.headline}"
        found = [
            name.removeprefix("validation/").removesuffix(end)
            for name in names
            if name.startswith("validation/") and name.endswith(end)
        ]
        return sorted(found, key=float, reverse=True)

    def events(self) -> list[tuple[int, str]]:
        """Returns the steps at which a phase ended, by its name, and those at which the
        parameters shrank within one."""
        found = []
        steps, phases = self.of("model/phase")
        _, stored = self.of("model/stored")
        for n in range(1, len(steps)):
            if phases[n] != phases[n - 1]:
                name = self.phases[int(phases[n - 1])]
                found.append((steps[n], f"end of {name}"))
            elif stored[n] < stored[n - 1]:
                found.append((steps[n], SHRINK))
        return found


def read(workdir: str | os.PathLike) -> Course:
    """Reads the course of a run.

    Raises:
      MissingFile: There is no run that has written metrics.
      UserError: A file of it is damaged.
    """
    workdir = Path(workdir)
    try:
        text = (workdir / METRICS).read_text(encoding="utf-8")
        config = (workdir / "config.json").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFile(
            f"{workdir}: must be the folder of a run that has begun, got one without"
            f" {Path(error.filename).name}. Name the workdir of a run."
        ) from error
    try:
        # the last line may be in the middle of being written
        complete = text[: text.rfind("\n") + 1].splitlines()
        lines = [json.loads(line) for line in complete]
        names = [phase["name"] for phase in json.loads(config)["phases"]]
        lines = sorted(lines, key=lambda line: line["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{workdir}: must hold the metrics and the config of a run, got other text"
            f" ({error!r}). The run writes them anew when it starts again."
        ) from error
    headline = (status.read(workdir) or {}).get("headline") or "loss"
    return Course(lines, names, headline)


def plot_course(workdir: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draws a run's loss, headline figure and parameters over its steps.

    Args:
      workdir: Its folder; the run may go on.
      path: The picture to write, in the format that it ends in.

    Raises:
      MissingFile: As `read`.
      UserError: As `read`, or nothing was written yet.
    """
    base_plots.save(draw_course(read(workdir)), path)


def draw_course(course: Course) -> figure.Figure:
    """Returns the picture of `plot_course`."""
    steps, losses = course.of("train/loss")
    if not steps:
        raise UserError(
            "metrics: must hold the loss of a step to draw, got none yet. Wait for it."
        )
    fractions, stored = course.fractions(), course.of("model/stored")
    rows = 1 + bool(fractions) + bool(stored[0])
    drawing = base_plots.new_figure(0.7 + 1.45 * rows)
    panels = drawing.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(steps, losses, color=base_plots.COLOURS[0], linewidth=1.4)
    if min(losses) > 0:
        panels[0].set_yscale("log")
    _name(panels[0], "training loss")
    if fractions:
        _draw_headline(panels[1], course, fractions)
    if stored[0]:
        _draw_stored(panels[-1], *stored, last=course.lines[-1]["step"])
    for panel in panels:
        base_plots.tidy(panel)
        panel.margins(x=0.02)
    _mark(panels, course.events())
    panels[-1].set_xlabel("step", color=base_plots.INK, fontsize=base_plots.LETTERS)
    drawing.align_ylabels(list(panels))
    return drawing


def _name(panel: axes.Axes, text: str) -> None:
    panel.set_ylabel(text, color=base_plots.INK, fontsize=base_plots.SMALL)


def _draw_headline(panel: axes.Axes, course: Course, fractions: Sequence[str]) -> None:
    """A line for each size, named beside the panel, where no data is."""
    for number, fraction in enumerate(fractions):
        steps, values = course.of(f"validation/{fraction}/{course.headline}")
        style = {**base_plots.line_style(number, number), "markersize": 4}
        panel.plot(steps, values, label=f"{float(fraction):.3g}", **style)
    _name(panel, f"validation\n{course.headline}")
    panel.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=base_plots.SMALL - 1,
        title="of the ranks",
        title_fontsize=base_plots.SMALL - 1,
        labelcolor=base_plots.INK,
    )


def _draw_stored(
    panel: axes.Axes, steps: Sequence[int], stored: Sequence[float], *, last: int
) -> None:
    """Steps down where a run shrinks, up to where it has come."""
    at, values = [*steps, max(last, steps[-1])], [*stored, stored[-1]]
    panel.plot(
        at, values, drawstyle="steps-post", color=base_plots.COLOURS[2], linewidth=1.6
    )
    panel.set_ylim(0, 1.15 * max(values))
    panel.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panel.yaxis.set_major_locator(ticker.MaxNLocator(4))
    _name(panel, "parameters\nallocated")


def _mark(panels: Sequence[axes.Axes], events: Sequence[tuple[int, str]]) -> None:
    """A line at each event through all panels, its name above the first one; of several
    shrinks in a row that leave no room for their names, one with their number."""
    for step, name in events:
        shrink = name == SHRINK
        for panel in panels:
            panel.axvline(
                step,
                color="#777777" if shrink else base_plots.INK,
                linestyle=":" if shrink else "--",
                linewidth=1.0,
                zorder=1.5,
            )
    low, high = panels[0].get_xlim()
    for step, text in _names(events, _LEAST_APART * (high - low)):
        panels[0].annotate(
            text,
            (step, 1.0),
            xycoords=panels[0].get_xaxis_transform(),
            xytext=(-2, 2),
            textcoords="offset points",
            rotation=25,
            ha="left",
            va="bottom",
            fontsize=base_plots.SMALL - 1,
            color=base_plots.INK,
        )


def _names(events: Sequence[tuple[int, str]], room: float) -> list[tuple[int, str]]:
    """Where names are written; shrinks that follow a shrink too closely are counted
    with it."""
    groups: list[tuple[int, str, int]] = []
    latest = -room
    for step, name in events:
        if name == SHRINK and groups and groups[-1][1] == SHRINK:
            if step - latest < room:
                first, _, count = groups.pop()
                groups.append((first, name, count + 1))
                latest = step
                continue
        groups.append((step, name, 1))
        latest = step
    return [
        (step, name if count == 1 else f"{count} {name}s")
        for step, name, count in groups
    ]
