"""What became of the runs of a campaign, as a table and as a page."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from tests.faults.plan import Row
from train.report import logs


class Result(NamedTuple):
    """What became of a run.

    Args:
      row: What happened to it first.
      faults: All that happened to it, as text.
      problems: In what it was not as it should be; a run with one is lost.
      seconds: How long it took.
      seconds_alone: How long processes outlived a peer that was killed.
      named: For each damaged checkpoint, whether the run named it.
    """

    row: Row
    faults: list[str]
    problems: list[str]
    seconds: float
    seconds_alone: list[float]
    named: list[bool]


def table(results: Sequence[Result]) -> str:
    """Returns the table: a line for each kind of fault and place."""
    cells: dict[tuple[str, str], list[int]] = {}
    for result in results:
        tried = cells.setdefault((result.row.kind, result.row.place), [0, 0, 0, 0])
        tried[0] += 1
        tried[1] += len(result.faults)
        tried[3 if result.problems else 2] += 1
    rows = [[*key, *counts] for key, counts in cells.items()]
    sums = [sum(counts[n] for counts in cells.values()) for n in range(4)]
    rows.append(["all", "", *sums])
    headers = ["fault", "where", "runs", "faults", "survived", "lost"]
    return logs.table(headers, rows)


def page(results: Sequence[Result], about: Mapping[str, str]) -> str:
    """Returns the page with the table, what it was made with, and what was lost."""
    lost = [result for result in results if result.problems]
    alone = [seconds for result in results for seconds in result.seconds_alone]
    named = [said for result in results for said in result.named]
    lines = [
        "# The fault campaign",
        "",
        "A Maestro training of 12 steps in two phases (`tests/faults/config.py`) is",
        "disturbed, and started again until it is done. It survives if the parameters,",
        "optimizer state and ranks that it ends with equal the undisturbed run's in",
        "every bit, `metrics.jsonl` has every step once with the same figures, every",
        "attempt ended with the status and the one message that it should, and nothing",
        "lies about.",
        "",
        *[f"- {name}: {value}" for name, value in about.items()],
        "",
        "```",
        table(results),
        "```",
        "",
        "Each line counts runs by their first fault; `faults` counts what followed in",
        "the same run, too.",
    ]
    if alone:
        lines.append(
            f"Of two processes with one killed, the other ended after at most"
            f" {max(alone):.1f} s (median {sorted(alone)[len(alone) // 2]:.1f} s)."
        )
    if named:
        lines.append(
            f"Of {len(named)} damaged checkpoints, {sum(named)} were named and skipped;"
            " the damage of the others was in bytes that are never read."
        )
    lines += [f"\nLost: {r.row} {r.faults}: {'; '.join(r.problems)}" for r in lost]
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """Returns what the campaign ran on."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python"
        f" {platform.python_version()}, JAX {jax.__version__}"
    )


def today() -> str:
    """Returns the date."""
    return datetime.date.today().isoformat()
