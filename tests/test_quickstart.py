"""The quickstart, whole: what the README promises of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path: Path):
    """At least 96 % with all ranks, at most 2 points less at a quarter; a picture."""
    workdir = tmp_path / "quickstart"
    command = [sys.executable, "-m", "train.quickstart"]
    command += ["--config=configs/digits_mlp.py", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {
        row["size"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]
    }
    assert rows["full"]["accuracy"] >= 0.96
    assert rows["0.25"]["accuracy"] >= rows["full"]["accuracy"] - 0.02
    assert rows["0.25"]["params"] < rows["0.5"]["params"] < rows["full"]["params"]
    assert (workdir / "frontier.png").stat().st_size > 10_000
