"""Whether a run that was disturbed is the one that was not: in every bit."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import assert_same_checkpoints, metric_lines

from lowrank_jax import checkpoint

RATES = ("train/examples_per_s",)
"""Figures of a run that depend on the clock."""
LEFT_BEHIND = (".lock", ".*.partial", "checkpoints/*tmp*", "checkpoints/.*")
"""What a run that has ended must not leave in its folder."""


def problems_of(workdir: Path, undisturbed: Path) -> list[str]:
    """Says in what a run that came to its end differs from the undisturbed one."""
    problems = []
    try:
        assert_same_checkpoints(
            checkpoint.open_checkpoint(workdir), checkpoint.open_checkpoint(undisturbed)
        )
    except (AssertionError, ValueError) as error:
        problems.append(f"parameters: {_first_lines(error)}")
    if _lines(workdir) != _lines(undisturbed):
        steps = [line["step"] for line in metric_lines(workdir)]
        problems.append(f"metrics: other lines, of steps {steps}")
    for pattern in LEFT_BEHIND:
        problems += [f"left behind: {path.name}" for path in workdir.glob(pattern)]
    if (workdir / "config.json").read_text() != (
        undisturbed / "config.json"
    ).read_text():
        problems.append("config.json: is another one")
    return problems


def _lines(workdir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in RATES}
        for line in metric_lines(workdir)
    ]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def untidy(
    err: Sequence[str], statuses: Sequence[int], allowed: Sequence[int]
) -> list[str]:
    """Says what is wrong with how processes ended: their status, or what they said."""
    problems = [
        f"process {number}: status {status}, not of {sorted(allowed)}"
        for number, status in enumerate(statuses)
        if status not in allowed
    ]
    for number, text in enumerate(err):
        if "Traceback" in text:
            problems.append(f"process {number}: a traceback, {text.splitlines()[-1]}")
    return problems


def complete_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run, the newest first."""
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    found = []
    for step in sorted(steps, reverse=True):
        try:
            checkpoint.open_checkpoint(folder / str(step))
            found.append(step)
        except ValueError:
            continue
    return found


def damage(rng: random.Random, folder: Path, kind: str) -> str:
    """Flips a bit of a checkpoint, or cuts a file off at a byte, each byte of all files
    as likely as every other; says what it did."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    (file,) = rng.choices(files, [path.stat().st_size for path in files])
    size = file.stat().st_size
    place = rng.randrange(size)
    with file.open("r+b") as opened:
        if kind == "cut-off file":
            opened.truncate(place)
            return f"{file.relative_to(folder)} cut off at {place} of {size} bytes"
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return f"{file.relative_to(folder)}, a bit of byte {place} of {size}"
