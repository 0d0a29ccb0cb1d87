"""The same run in one process and in several, which start, stop and go on together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import commands
import pytest
import support
from sharded import assert_same_run, short_run

from train import loop
from train.stopping import REQUEUE

CONFIG = "--config=tests/faults/config.py:smoke"


def launch(
    processes: int, devices: int, workdir: Path, *options: str
) -> subprocess.Popen[str]:
    """Starts a run in several processes on this machine."""
    words = [sys.executable, "-m", "launch.local", f"--num_processes={processes}"]
    words += [f"--devices_per_process={devices}", "--", sys.executable]
    words += ["-m", "train.main", CONFIG, f"--workdir={workdir}", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=commands.ROOT, stdout=pipe, stderr=pipe, text=True
    )


def ended(process: subprocess.Popen[str], timeout: int = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def trained(processes: int, devices: int, workdir: Path, *options: str) -> None:
    status, out, err = ended(launch(processes, devices, workdir, *options))
    assert status == 0, err
    # Gloo's threads greet on the same stream, sometimes within each other's lines.
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    assert json.loads(line)["step"] == 6  # of process 0 alone


def wait_for(workdir: Path, done: int, process: subprocess.Popen[str]) -> None:
    """Returns when a run says that so many steps are done."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        file = workdir / "status.json"
        if file.exists() and (json.loads(file.read_text()).get("step") or 0) >= done:
            return
        time.sleep(0.02)
    raise AssertionError(ended(process))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    loop.train_and_evaluate(short_run(), workdir)
    return workdir


def children(parent: int) -> list[int]:
    """Processes that a process has started, the oldest first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            fields = status.read_text().rpartition(")")[2].split()
            found += [int(status.parent.name)] if int(fields[1]) == parent else []
    return sorted(found)


class TestRuns:
    def test_two_processes_stop_and_one_goes_on(self, alone, tmp_path):
        """Split over both kinds of axes; a SIGTERM reaches the launcher."""
        workdir = tmp_path / "run"
        mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
        process = launch(2, 2, workdir, *mesh)
        wait_for(workdir, 1, process)
        process.send_signal(signal.SIGTERM)
        status, _, err = ended(process)
        assert (status, "run it again to go on" in err) == (REQUEUE, True), err
        loop.train_and_evaluate(short_run(), workdir)
        assert_same_run(workdir, alone)

    @pytest.mark.slow
    def test_ctrl_c_to_one_of_two_saves(self, alone, tmp_path):
        """It becomes the SIGTERM that all agree on."""
        workdir = tmp_path / "run"
        process = launch(2, 1, workdir)
        wait_for(workdir, 1, process)
        os.kill(children(process.pid)[-1], signal.SIGINT)
        status, _, err = ended(process)
        assert (status, "run it again to go on" in err) == (REQUEUE, True), err
        loop.train_and_evaluate(short_run(), workdir)
        assert_same_run(workdir, alone)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes, devices", [(2, 1), (4, 1), (2, 4), (1, 4)])
    def test_any_number_of_processes(self, alone, tmp_path, processes, devices):
        trained(processes, devices, tmp_path / "run")
        assert_same_run(tmp_path / "run", alone)

    @pytest.mark.slow
    def test_what_several_wrote_is_cut_and_judged_by_one(self, alone, tmp_path):
        trained(2, 2, tmp_path / "run", "--config.mesh.fsdp=4")
        figures = []
        for workdir in (tmp_path / "run", alone):
            cut = tmp_path / f"cut_{len(figures)}"
            support.truncate(workdir, cut, "rank_fraction", 0.5)
            figures.append(support.evaluate(cut))
        assert figures[0]["ranks"] == figures[1]["ranks"]
        assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)

    @pytest.mark.slow
    def test_what_one_wrote_goes_on_in_four(self, alone, tmp_path):
        support.interrupt(short_run(), tmp_path / "run", 3)
        trained(4, 1, tmp_path / "run")
        assert_same_run(tmp_path / "run", alone)


def pair(*of_each: Sequence[str]) -> list[tuple[int, str, str]]:
    """Runs processes that are started by hand, each with words of its own."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "train.main", *words],
            cwd=commands.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in of_each
    ]
    return [ended(process) for process in started]


class TestMistakes:
    def test_another_config_is_named(self, tmp_path):
        words = ["--coordinator=127.0.0.1:45123", "--num_processes=2", CONFIG]
        words.append(f"--workdir={tmp_path / 'run'}")
        first, second = pair(
            [*words, "--process_id=0"],
            [*words, "--process_id=1", "--config.seed=4"],
        )
        for status, out, err in (first, second):
            assert (status, "{" in out) == (1, False)  # Gloo greets there
            assert "processes: must run the same config" in err
            assert "process 1: config.seed: 4 there, 3 here (in process 0)" in err
        assert not list((tmp_path / "run").glob("*"))

    @pytest.mark.slow  # waits for a disk over the network
    def test_another_folder_is_named(self, tmp_path):
        words = ["--coordinator=127.0.0.1:45125", "--num_processes=2", CONFIG]
        ended_ones = pair(
            *(
                [*words, f"--process_id={n}", f"--workdir={tmp_path / str(n)}"]
                for n in range(2)
            )
        )
        for status, _, err in ended_ones:
            assert status == 1
            assert "--workdir: must be one folder that all processes see" in err

    def test_a_coordinator_that_is_not_there(self, tmp_path):
        words = ["--coordinator=127.0.0.1:45124", "--num_processes=2", CONFIG]
        words += [f"--workdir={tmp_path / 'run'}", "--process_id=1"]
        began = time.monotonic()
        ((status, _, err),) = pair([*words, "--coordinator_timeout=3"])
        assert status == REQUEUE
        assert "all processes must meet within 3 s" in err
        assert "process 1 of 2 at the coordinator 127.0.0.1:45124" in err
        assert time.monotonic() - began < 60
