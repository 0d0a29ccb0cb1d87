"""Checkpoints of several processes: written together, read by any number of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(count: int, *tasks: str | Path) -> list[list[str]]:
    """The lines that each process of a run printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = ROOT / "tests" / "saving_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (script, port, count, index, *tasks))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for index in range(count)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    lines = [out.splitlines() for out, _ in done]
    return [[x for x in one if x.startswith(("step", "damaged"))] for one in lines]


def pieces_of(file: Path) -> list[str]:
    return sorted(json.loads(file.read_text())["pieces"])


class Outcome(NamedTuple):
    """Folders of the same numbers and what was printed while they were written.

    Args:
      one: Written by one process.
      two: Written by two.
      saved: The lines of the one, then what it read of both.
      printed: The lines of each of the two, then what each read of `one`, of `two`,
        and of a third checkpoint, damaged in what the second process wrote of it.
    """

    one: Path
    two: Path
    saved: list[str]
    printed: list[list[str]]


pytestmark = pytest.mark.slow  # four processes; test_processes has two in every run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    root = tmp_path_factory.mktemp("run")
    one, two, bad = root / "one", root / "two", root / "bad"
    (saved,) = run(1, "save", one)
    tasks = ("save", two, "read", one, "read", two)
    printed = run(2, *tasks, "save", bad, "damage", bad, "read", bad)
    (read,) = run(1, "read", one, "read", two)
    return Outcome(one, two, saved + read, printed)


def test_any_number_of_processes_writes_and_reads_the_same_bits(outcome):
    """One and two processes save; one and two read what either saved."""
    first, second, *read = outcome.saved
    assert [line.split(":")[0] for line in (first, second)] == ["step 1", "step 2"]
    assert first.split()[-1] != second.split()[-1]
    assert read == [second] * 2
    for lines in outcome.printed:
        assert lines[:6] == [first, second, second, second, first, second]


def test_each_process_writes_its_part_and_nothing_twice(outcome):
    """What is on every device, or on each process's own, is written by one of them."""
    for writers, folder in ((1, outcome.one), (2, outcome.two)):
        params, local = folder / "2/params", folder / "2/local"
        files = [
            f"process_{i}.{end}" for i in range(writers) for end in ("bin", "json")
        ]
        assert sorted(p.name for p in params.glob("process_*")) == files
        sizes = [(params / file).stat().st_size for file in files[::2]]
        assert sum(sizes) == (24 * 16 + 16 * 16 + 16) * 4
        assert min(sizes) >= (24 * 16 + 16 * 16) * 4 // writers
        assert pieces_of(local / "process_0.json") == ["step"]
    assert pieces_of(outcome.two / "2/local/process_1.json") == []


def test_damage_that_one_process_sees_is_an_error_on_all(outcome):
    """Both go on with the step before, and neither waits for the other for ever."""
    first = outcome.saved[0]
    texts = sorted(lines[6] for lines in outcome.printed)
    assert [lines[7:] for lines in outcome.printed] == [[first]] * 2
    assert all(text.startswith("damaged: checkpoint ") for text in texts)
    assert "array layer/factors/" in texts[0] + texts[1]
    assert "must be readable, got errors on processes" in texts[0] + texts[1]
