"""The first line of a binary, and how it answers SIGTERM and Ctrl-C, line by line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import pytest

from lowrank_jax import checkpoint

# imports nothing that takes long; what it does next is read from stdin
PROGRAM = """
import signal, sys
from train import early
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
early.begin("own.program")
for line in sys.stdin:
    if line == "imported\\n":
        early.SIGNALS.imported()
    elif line == "second\\n":
        early._SECONDS_TO_SECOND = 0.0
    elif line == "compile\\n":  # no Python runs in the main thread
        import hashlib, threading
        said = ("compiling\\n",)
        threading.Timer(0.2, sys.stderr.write, said).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)
    elif line == "fork\\n":  # as a loader of the user's own may do
        import multiprocessing, time
        fork = multiprocessing.get_context("fork")
        worker = fork.Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join(10)
        print("worker ended with", worker.exitcode, file=sys.stderr, flush=True)
    elif line == "train\\n":
        noted = []
        with early.SIGNALS.noting(lambda: noted.append(1)):
            print("training", file=sys.stderr, flush=True)
            for line in sys.stdin:
                print("noted" if noted else "on", file=sys.stderr, flush=True)
                if noted:
                    sys.exit(75)
"""


TOTAL = ["total", "154,634", "85,002"]
"""Numbers stored, and those of the cheapest forms, of the model that is trained."""


@contextlib.contextmanager
def started(*words: str, **how: object) -> Iterator[subprocess.Popen]:
    """A process of Python, which does not outlive the test."""

    path = os.pathsep.join([str(commands.ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **how,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen, *lines: str) -> None:
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()


def next_line(process: subprocess.Popen) -> str:
    return process.stderr.readline().rstrip("\n")


def ask_and_end(process: subprocess.Popen, number: int) -> tuple[str, int]:
    """What is said on a signal, and the status that the process then ends with."""
    process.send_signal(number)
    return next_line(process), process.wait(timeout=60)


SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}


@pytest.mark.parametrize("name", SIGNALS)
def test_before_anything_is_there_to_save(name):
    """While it imports, the program ends there and then; afterwards by Python's own
    way out, but it has said so before."""
    for steps in ((), ("imported",)):
        with started("-c", PROGRAM) as process:
            assert next_line(process) == "own.program: importing JAX ..."
            tell(process, *steps)
            ended = ask_and_end(process, SIGNALS[name])
            assert ended == (f"{name}: stopping (exit status 75)", 75)
            assert process.stderr.read() == ""  # no traceback


@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_saves_first(name):
    """The line comes at once, the end when the run has noted it."""
    with started("-c", PROGRAM) as process:
        next_line(process)
        tell(process, "imported", "train")
        assert next_line(process) == "training"
        process.send_signal(SIGNALS[name])
        line = f"{name}: saving at the next step, then stopping (exit status 75)"
        assert next_line(process) == line
        tell(process, "step")
        assert next_line(process) == "noted"
        assert process.wait(timeout=60) == 75


def test_the_same_request_twice_in_a_moment_is_one():
    """A terminal and a launcher both hand it on."""
    with started("-c", PROGRAM) as process:
        next_line(process)
        tell(process, "imported", "train")
        next_line(process)
        process.send_signal(signal.SIGINT)
        line = "Ctrl-C: saving at the next step, then stopping (exit status 75)"
        assert next_line(process) == line
        process.send_signal(signal.SIGTERM)
        tell(process, "step")
        assert next_line(process) == "noted"
        assert process.wait(timeout=60) == 75


def test_a_forked_process_answers_for_itself():
    """Terminating a worker ends the worker, and asks nothing of the run."""
    with started("-W", "ignore", "-c", PROGRAM) as process:
        next_line(process)
        tell(process, "imported", "fork")
        assert next_line(process) == f"worker ended with -{int(signal.SIGTERM)}"
        tell(process, "train")
        assert next_line(process) == "training"
        tell(process, "step")
        assert next_line(process) == "on"


def test_a_second_request_ends_it_at_once():
    """Also where no Python runs in the main thread, as in the middle of compiling."""
    with started("-c", PROGRAM) as process:
        next_line(process)
        tell(process, "imported", "second", "compile")
        assert next_line(process) == "compiling"
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGTERM: stopping (exit status 75)"
        ended = ask_and_end(process, signal.SIGTERM)
        line = "SIGTERM again: stopping at once, without saving (exit status 75)"
        assert ended == (line, 75)


CONFIG = "--config=configs/digits_mlp.py:smoke"


def until(process: subprocess.Popen, found: Callable[[str], object]) -> list[str]:
    """The lines up to one that is looked for."""
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if found(lines[-1]):
            return lines
    raise AssertionError(lines)


def test_a_binary_from_its_first_second(tmp_path: Path):
    """What is said until the first step, in order; SIGTERM in the middle of compiling
    is answered before that is over, and the run is saved and goes on."""
    words = ("-m", "train.main", CONFIG, f"--workdir={tmp_path / 'run'}")
    with started(*words, cwd=commands.ROOT) as process:
        lines = until(process, lambda line: "compiling" in line)
        process.send_signal(signal.SIGTERM)
        lines += until(process, lambda line: line.startswith("stopped"))
        assert process.wait(timeout=60) == 75
    lines = [line for line in lines if not re.search(r": done in [\d.]+ s$", line)]
    lines = [re.sub(r"\d+\.\d s", "N s", line) for line in lines]
    table = slice(lines.index("mlp:") + 1, lines.index("phase nested: steps 0 to 80"))
    assert any(line.split()[:3] == TOTAL for line in lines[table])
    del lines[table]
    assert lines == [
        "train.main: importing JAX ...",
        "reading data set digits ...",
        "building the model ...",
        "checking 1 phase ...",
        "digits: 1,300 train, 137 validation, 360 test",
        "mlp:",
        "phase nested: steps 0 to 80",
        "step 0/80, compiling 10 steps at once of phase nested ...",
        "SIGTERM: saving at the next step, then stopping (exit status 75)",
        "compiled in N s",
        "stopped: stopped at step 10; run it again to go on.",
    ]
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 10
