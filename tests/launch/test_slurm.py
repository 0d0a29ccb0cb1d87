"""launch/slurm.sbatch under a real Slurm: this machine is controller and node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_under_slurm(tmp_path):
    """Stopped or over its time, it saves, is queued again, and ends as if it were not.

    In minutes. The same with the elements of a sweep's array.
    """
    if os.geteuid():
        pytest.skip("Slurm's daemons are started as root")
    done = subprocess.run(
        [HERE / "slurm/try.sh", tmp_path / "try", sys.executable],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip("Debian's slurm-wlm cannot be installed here")
    print(done.stdout)
    assert done.returncode == 0
    assert "same parameters" in done.stdout
    for run in ("stopped", "limited"):
        log = (tmp_path / "try" / f"{run}.log").read_text()
        assert "status 75" in log and "stopped at step" in log
    sweep = tmp_path / "try/sweep"
    states = json.loads((sweep / "results.json").read_text())["jobs"]
    assert states == {"seed=0": "done", "seed=1": "done", "seed=2": "failed"}
    attempts = {
        name: len((sweep / f"jobs/{name}/workdir/attempts").read_text().splitlines())
        for name in states
    }
    assert attempts == {"seed=0": 1, "seed=1": 2, "seed=2": 1}
