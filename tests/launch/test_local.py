"""The local launcher: several processes, one log, one status, no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from launch import processes
from train import stopping

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub.py")


def command(plans: Mapping[str, Sequence[str]], *flags: str) -> list[str]:
    """The launcher around the stub, with what each process is to do."""
    launcher = [sys.executable, "-m", "launch.local", *flags, "--"]
    return [*launcher, sys.executable, str(STUB), json.dumps(plans)]


def launch(
    plans: Mapping[str, Sequence[str]], *flags: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(plans, *flags), cwd=ROOT, capture_output=True, text=True, timeout=30
    )


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_launchers_and_runs_agree_on_the_status():
    """Two packages that do not import each other write the number down."""
    assert processes.REQUEUE == stopping.REQUEUE


def test_flags_environment_and_output():
    """Each process gets its three flags; one stdout, one log whose lines say whose."""
    words = "{process_id}/{num_processes} {coordinator} {JAX_NUM_CPU_DEVICES}"
    plans = {"*": [f"say=log {words}", f"print=out {words}"]}
    done = launch(plans, "--num_processes=3", "--devices_per_process=4")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    _, ids, coordinator, devices = line.split()
    assert (ids, devices) == ("0/3", "4")
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and int(port) > 1023
    rest = f"{coordinator} 4"
    assert sorted(done.stderr.splitlines()) == [
        f"[1] log 1/3 {rest}",
        f"[1] out 1/3 {rest}",
        f"[2] log 2/3 {rest}",
        f"[2] out 2/3 {rest}",
        f"log 0/3 {rest}",
    ]


def test_a_log_file_is_appended_to(tmp_path):
    """Nothing is left on stderr."""
    (tmp_path / "log").write_text("before\n")
    done = launch({"*": ["say=x"]}, "--num_processes=2", f"--log={tmp_path}/log")
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "before" and sorted(lines[1:]) == ["[1] x", "x"]


@pytest.mark.parametrize(
    "statuses, combined",
    [
        ([0, 0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([137, 75], 75),  # a killed peer: the others say that a restart goes on
        ([75, 1], 1),  # a mistake stays one
        ([1, 75], 1),
        ([137, 1], 137),  # the first to fail
        ([3, 137], 3),
    ],
)
def test_the_status_of_a_run(statuses, combined):
    """As the contract of launchers says."""
    assert processes.combine(statuses) == combined


def test_the_status_is_passed_on():
    done = launch({"0": ["kill=9"], "1": ["sleep=0.3", "exit=75"]}, "--num_processes=2")
    assert done.returncode == 75
    assert "process 0 ended with status 137" in done.stderr


def test_a_dead_process_ends_the_run():
    """Its peers get the grace time, then SIGTERM, then, if they hang, SIGKILL."""
    plans = {"0": ["hang"], "1": ["save"], "2": ["exit=3"]}
    began = time.monotonic()
    done = launch(plans, "--num_processes=3", "--grace_s=0.5")
    assert done.returncode == 75  # process 1 saved
    assert 1.0 < time.monotonic() - began < 10
    done = launch({"0": ["hang"], "1": ["exit=3"]}, "--num_processes=2", "--grace_s=0")
    assert done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_on_to_all(tmp_path, number):
    """SIGTERM saves; what does not handle SIGINT ends by it."""
    plans = {"*": [f"pid={tmp_path}/", "save"]}
    started = subprocess.Popen(
        command(plans, "--num_processes=2", "--restarts=3", f"--log={tmp_path}/log"),
        cwd=ROOT,
    )
    wait_for(lambda: {"0", "1"} <= {p.name for p in tmp_path.iterdir()})
    started.send_signal(number)
    wanted = 75 if number == signal.SIGTERM else 128 + signal.SIGINT
    assert started.wait(timeout=10) == wanted
    # asked to stop, it is not started again
    assert "restart" not in (tmp_path / "log").read_text()


def test_restarts(tmp_path):
    """After 75 and after a death by a signal; not after a mistake."""
    plans = {"0": [f"once={tmp_path}/a", "print=done"], "1": [f"once={tmp_path}/b"]}
    done = launch(plans, "--num_processes=2", "--restarts=1")
    assert (done.returncode, done.stdout) == (0, "done\n")
    done = launch({"*": ["kill=9"]}, "--restarts=2")
    assert done.returncode == 137 and done.stderr.count("restart") == 2
    done = launch({"*": ["exit=1"]}, "--restarts=2")
    assert done.returncode == 1 and "restart" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_killed_launcher_leaves_nobody(tmp_path):
    """SIGKILL leaves it no time to end its processes: the kernel does."""
    plans = {"*": [f"pid={tmp_path}/", "hang"]}
    started = subprocess.Popen(
        command(plans, "--num_processes=2"), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert all(map(is_alive, pids))
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_an_ended_process_leaves_nobody(tmp_path):
    """What a hanging process started ends with it."""
    plans = {"0": [f"child={tmp_path}/pid", "hang"], "1": ["sleep=0.3", "exit=3"]}
    assert launch(plans, "--num_processes=2", "--grace_s=0").returncode == 3
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "command: must follow --, got none. Add"),
        (["no_such_program"], "no_such_program: must be a command"),
    ],
)
def test_mistakes(words, message):
    """One line, status 1."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", "--", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_process_of_a_real_run(tmp_path):
    """The others end with 75 within their time; started again, the run is finished."""
    workdir = tmp_path / "run"
    words = [sys.executable, "-m", "launch.local", "--num_processes=2", "--restarts=1"]
    words += ["--", sys.executable, "-m", "train.main", f"--workdir={workdir}"]
    words += ["--config=configs/digits_mlp.py:smoke"]
    words += ["--config.checkpoint_every_steps=20"]
    started = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: bool(list(workdir.glob("checkpoints/*[0-9]"))), 300)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        if b"--process_id=1" in line and f"--workdir={workdir}".encode() in line:
            os.kill(int(file.parent.name), signal.SIGKILL)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 80
    assert "process 1 ended with status 137" in err
    assert "status 75: restart 1 of 1" in err and "resuming at step" in err
