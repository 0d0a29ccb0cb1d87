"""A small fault campaign in every test run, the parts of the large one, and a control
that loses what it should."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import disks
import pytest

from tests.faults import report
from tests.faults.attempts import CONFIG
from tests.faults.campaign import run_campaign
from tests.faults.plan import ROWS, Row, deal
from tests.faults.verdict import damage, problems_of

SMALL = (Row("SIGKILL", "files", 1), Row("SIGTERM", "phase end", 1))
DISKS = (Row("full disk", "any time", 1), Row("read-only disk", "next start", 1))


@pytest.mark.parametrize("rows", [SMALL, DISKS], ids=["kills", "disks"])
@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path, rows: tuple[Row, ...]):
    """No run is lost, and every fault struck."""
    if rows is DISKS:
        try:
            with disks.small_disk(tmp_path / "disk"):
                pass
        except disks.NoDisk as reason:
            pytest.skip(f"no small disk can be mounted: {reason}")
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    results = run_campaign(rows, tmp_path, cache, config=f"{CONFIG}:smoke")
    assert [result.problems for result in results] == [[]] * len(rows)
    assert all(result.faults for result in results)
    undisturbed = tmp_path / "undisturbed_1"
    assert problems_of(undisturbed, undisturbed) == []
    check_the_judge(undisturbed, tmp_path / "other")


def check_the_judge(undisturbed: Path, other: Path) -> None:
    """One bit, one line, one file too many: each is a lost run."""
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    first = {**json.loads(lines[0]), "train/loss": 0.0}
    changes = {
        "metrics": ("metrics.jsonl", "\n".join([json.dumps(first), *lines[1:]])),
        "left behind": (".lock", ""),
        "config.json": ("config.json", "{}"),
    }
    for problem, (name, text) in changes.items():
        copied = other / name
        shutil.copytree(undisturbed, copied)
        (copied / name).write_text(text)
        (found,) = problems_of(copied, undisturbed)
        assert found.startswith(problem)


@pytest.mark.parametrize("count", [29, 206, 1000])
def test_every_fault_is_dealt_in_proportion(count):
    total = sum(row.weight for row in ROWS)
    for row, number in Counter(deal(count)).items():
        assert abs(number - row.weight * count / total) < 2
    assert len(deal(count)) == count
    assert deal(10) == deal(count)[:10]
    assert set(deal(206)) == set(ROWS)


@pytest.mark.parametrize("kind", ["flipped bit", "cut-off file"])
def test_damage_is_what_it_says(tmp_path: Path, kind):
    content = bytes(range(256))
    (tmp_path / "array").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    said = damage(random.Random(1), tmp_path, kind)
    left = (tmp_path / "array").read_bytes()
    assert "array" in said
    if kind == "cut-off file":
        assert content.startswith(left) and len(left) < len(content)
        return
    changed = [a ^ b for a, b in zip(content, left, strict=True) if a != b]
    assert len(changed) == 1 and changed[0].bit_count() == 1


def test_the_page_counts_what_was_lost():
    row, other = Row("SIGKILL", "save", 1), Row("SIGTERM", "step", 1)
    results = [
        report.Result(row, ["a", "b"], [], 1.0, [2.0, 4.0], [True]),
        report.Result(row, ["a"], ["parameters: another bit"], 1.0, [], [False]),
        report.Result(other, [], [], 1.0, [], []),
    ]
    page = report.page(results, {"seed": "3"})
    assert "SIGKILL  save      2       3         1     1" in page
    assert "all                3       3         2     1" in page
    assert "after at most 4.0 s" in page and "Of 2 damaged checkpoints, 1" in page
    assert "parameters: another bit" in page and "- seed: 3" in page
