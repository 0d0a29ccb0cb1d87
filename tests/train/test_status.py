"""The status file, and what `train.status` makes of it and of what lies beside it."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import commands
import numpy as np
import pytest

from lowrank_jax.errors import UserError
from train import folders
from train import status as status_binary
from train.report import status
from train.report.progress import Progress
from train.stopping import Interrupted, NotFinite


def written(workdir: Path) -> dict:
    return json.loads((workdir / "status.json").read_text())


def test_a_state_is_written_at_once_and_the_rest_each_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    with status.StatusFile(tmp_path) as file:
        assert written(tmp_path)["state"] == "starting"
        file.write(state="training", step=1)
        file.write(state="training", step=2)
        assert written(tmp_path)["step"] == 1
        now[0] += 1.0
        file.write(state="training", step=3, ranks={"head": np.int64(8)})
        assert written(tmp_path)["step"] == 3
        file.write(state="saving")
    last = status.read(tmp_path)
    assert (last["state"], last["step"], last["ranks"]) == ("finished", 3, {"head": 8})
    assert last["pid"] == os.getpid() and last["time"].endswith("+00:00")
    assert set(last) <= set(status.FIELDS)


@pytest.mark.parametrize(
    "error, state, message",
    [
        (None, "finished", ""),
        (Interrupted("stopped at step 3"), "stopped", "stopped at step 3"),
        (NotFinite("loss: NaN\nmore"), "failed", "loss: NaN"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_the_end_is_said(tmp_path, error, state, message):
    raising = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with raising, status.StatusFile(tmp_path) as file:
        file.write(state="training", rate=3.0, seconds_left=5.0)
        if error is not None:
            raise error
    last = status.read(tmp_path)
    assert (last["state"], last["message"]) == (state, message)
    assert (last["rate"], last["seconds_left"]) == (None, None)


def test_a_process_that_does_not_write(tmp_path):
    with status.StatusFile(tmp_path, enabled=False) as file:
        file.write(state="training")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_a_run_for_its_status(small_disk):
    """The old file stays whole."""
    with status.StatusFile(small_disk.folder) as file:
        small_disk.fill()
        file.write(state="training", ranks={f"layer_{n}": n for n in range(1000)})
        assert written(small_disk.folder)["state"] == "starting"
        small_disk.empty()
        file.write(state="saving")
        assert len(written(small_disk.folder)["ranks"]) == 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"state": "trai',
        "[]",
        "null",
        '{"state": "asleep"}',
        '{"state": "training"}',
        '{"state": "training", "time": "now"}',
        '{"state": "training", "time": "2026-01-01T00:00:00+00:00", "rate": "fast"}',
        '{"state": ["training"]}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(UserError, match="status.json: must be JSON that a run wrote"):
        status.read(tmp_path)
    report = status_binary.run_report(tmp_path)
    assert len(report["problems"]) == 1
    assert "damaged: " in status_binary.describe(report)


def test_progress_tells_the_file(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    with Progress(tmp_path, 200) as progress:
        progress.compiling(0, "the step", phase="prune")
        assert written(tmp_path)["state"] == "compiling"
        now[0] = 60.0
        progress.compiled()
        progress.training(1)
        assert written(tmp_path)["state"] == "training"
        now[0] = 66.0
        progress.update(61, "loss 2")
        values = written(tmp_path)
    expected = {"state": "training", "step": 61, "last_step": 200, "rate": 10.0}
    assert values | expected | {"message": "loss 2", "phase": "prune"} == values
    assert values["seconds_left"] == pytest.approx(13.9)


class TestWhatARunIsDoing:
    def test_one_that_goes_on(self, tmp_path):
        with folders.lock(tmp_path), status.StatusFile(tmp_path) as file:
            file.write(state="training", step=3, last_step=10, phase="prune", rate=2.0)
            report = status_binary.run_report(tmp_path)
        assert (report["state"], report["alive"]) == ("training", True)
        text = status_binary.describe(report)
        for part in ("training", "phase prune", "step 3/10", f"process {os.getpid()}"):
            assert part in text

    def test_one_that_died(self, tmp_path):
        """It did not say so; that nobody holds its lock does."""
        file = status.StatusFile(tmp_path)
        file.write(state="training", step=3, last_step=10)
        report = status_binary.run_report(tmp_path)
        assert (report["state"], report["alive"]) == ("died", False)
        assert "died at step 3; start it again" in status_binary.describe(report)

    def test_one_before_it_said_anything(self, tmp_path):
        assert status_binary.run_report(tmp_path)["state"] == "not started"

    def test_one_of_a_version_without_the_file(self, run, tmp_path):
        """Its checkpoints say what they can."""
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run/status.json").unlink(missing_ok=True)
        report = status_binary.run_report(tmp_path / "run")
        assert report["state"] == "unknown" and report["ranks"]
        (step,) = report["checkpoints"]
        assert report["step"] == step and report["checkpoints"][step] > 1000


def test_the_command(run, tmp_path):
    """A run, a sweep of three jobs, damaged files; every last line is JSON."""
    sweep = tmp_path / "sweep"
    for job in ("a", "b"):
        (sweep / "jobs" / job).mkdir(parents=True)
    shutil.copytree(run, sweep / "jobs/a/workdir")
    (sweep / "jobs/a/result.json").write_text("{}")
    (sweep / "jobs/b/workdir").mkdir()
    status.StatusFile(sweep / "jobs/b/workdir").write(state="training", step=3)
    jobs = {name: {} for name in "abc"}
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    damaged, broken = tmp_path / "damaged", tmp_path / "broken"
    damaged.mkdir()
    (damaged / "status.json").write_text("{")
    broken.mkdir()
    (broken / "sweep.json").write_text('{"jobs": ')
    ended = commands.run(
        {
            "run": ("train.status", run),
            "several": ("train.status", sweep, run, damaged),
            "broken": ("train.status", broken),
            "missing": ("train.status", tmp_path / "missing"),
            "nothing": ("train.status",),
        }
    )
    (one,) = ended["run"].result["runs"]
    assert one["checkpoints"] and "checkpoints of steps" in ended["run"].out
    states = [report["state"] for report in ended["several"].result["runs"]]
    assert states[:3] == ["finished", "died", "not started"]
    for line in ("died at step 3; start it again", f"damaged: {damaged}/status.json: "):
        assert line in ended["several"].out
    assert ended["broken"].message.startswith(f"error: {broken}/sweep.json: must be JS")
    assert ended["missing"].message.startswith("error: WORKDIR: must be the folder of")
    assert ended["nothing"].message.startswith("error: WORKDIR: must be given, got non")
