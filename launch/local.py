"""Runs a program as several processes on this machine, with one log.

`python -m launch.local --num_processes=2 --devices_per_process=4 -- python -m
train.main --config=... --workdir=...` appends `--coordinator --num_processes
--process_id` to the command. Stdout is that of process 0; everything else goes to
stderr, or to --log, the lines of process 2 behind "[2] ". SIGTERM and SIGINT go on to
all processes.

The exit status: 0 if all end with 0; 75, "start it again", if one does and none ends
with 1; else the first that is neither; 128 + n stands for signal n.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from absl import app, flags

from launch import processes
from launch.processes import REQUEUE, Process, Signals

_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 1, "How many processes.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", 1, "Simulated CPU devices of each process.", lower_bound=1
)
_LOG = flags.DEFINE_string("log", None, "File to append the log to; stderr if none.")
_GRACE = flags.DEFINE_float(
    "grace_s",
    60.0,
    "Seconds that the others have after one process failed, and again between the"
    " SIGTERM and the SIGKILL that they then get.",
    lower_bound=0.0,
)
_RESTARTS = flags.DEFINE_integer(
    "restarts",
    0,
    "How often to start the run again that ends with status 75 or by a signal.",
    lower_bound=0,
)


class Log:
    """Takes whole lines from several threads.

    Args:
      file: Where they go, unbuffered.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._lock = file, threading.Lock()

    def say(self, message: str) -> None:
        """Writes a line of the launcher's own."""
        self._write(f"launch.local: {message}\n".encode())

    def follow(self, pipe: IO[bytes], prefix: bytes) -> threading.Thread:
        """Copies a pipe until its end; the thread that does so is returned."""

        def copy() -> None:
            with pipe:
                for line in pipe:
                    end = b"" if line.endswith(b"\n") else b"\n"
                    self._write(prefix + line + end)

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def _write(self, line: bytes) -> None:
        with self._lock:
            self._file.write(line)
            self._file.flush()


def run_once(
    command: Sequence[str],
    num_processes: int,
    env: Mapping[str, str],
    log: Log,
    signals: Signals,
    grace_s: float,
) -> int:
    """Runs all processes to their end, once.

    Args:
      command: What each runs; the three flags are appended.
      num_processes: How many.
      env: Their environment.
      log: Where their lines go.
      signals: What is to be passed on to them.
      grace_s: Seconds that the others have when one failed.

    Returns:
      The status of the run.
    """
    with _started(command, num_processes, env, log) as started:
        ended: dict[int, int] = {}
        deadline = float("inf")
        while len(ended) < num_processes and time.monotonic() < deadline:
            for number in signals.take():
                processes.send(started, number)
            statuses = dict(enumerate(map(processes.status, started)))
            new = {i: s for i, s in statuses.items() if s is not None}
            failed = [i for i in new if new[i] and i not in ended]
            ended |= new
            if failed and deadline == float("inf"):
                # Of several at once, not one that another has brought to its end.
                first = min(failed, key=lambda index: new[index] == processes.REQUEUE)
                deadline = time.monotonic() + grace_s
                log.say(f"process {first} ended with status {new[first]}")
            processes.pause()
        if len(ended) < num_processes:
            log.say(f"ending the others, {grace_s:g} s later")
            processes.end(started, grace_s)
        for index, process in enumerate(started):
            ended.setdefault(index, processes.status(process))
    return processes.combine(list(ended.values()))


@contextlib.contextmanager
def _started(
    command: Sequence[str], num_processes: int, env: Mapping[str, str], log: Log
) -> Iterator[list[Process]]:
    """Starts all processes; none is left at the end, whatever happens."""
    coordinator = f"127.0.0.1:{_free_port()}"
    started: list[Process] = []
    try:
        for index in range(num_processes):
            own = [
                f"--coordinator={coordinator}",
                f"--num_processes={num_processes}",
                f"--process_id={index}",
            ]
            # Process 0 has our stdout; that of the others goes with their stderr.
            stdout = subprocess.PIPE if index else None
            stderr = subprocess.STDOUT if index else subprocess.PIPE
            started.append(
                processes.start([*command, *own], env, stdout=stdout, stderr=stderr)
            )
        threads = []
        for index, process in enumerate(started):
            pipe = process.stdout or process.stderr
            threads.append(log.follow(pipe, f"[{index}] ".encode() if index else b""))
        yield started
    finally:
        processes.end(started, 0.0)
    for thread in threads:
        thread.join(timeout=5.0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(argv: Sequence[str]) -> None:
    command = argv[1:]
    if not command:
        sys.exit(
            "error: command: must follow --, got none. Add -- python -m train.main"
            " --config=... --workdir=..."
        )
    env = {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(_DEVICES.value),
    }
    try:
        with contextlib.ExitStack() as files, Signals() as signals:
            # unbuffered: a line is there when its process is gone
            file = sys.stderr.buffer
            if _LOG.value is not None:
                file = files.enter_context(open(_LOG.value, "ab", buffering=0))
            sys.exit(_run(command, env, Log(file), signals))
    except OSError as error:
        place = error.filename or command[0]
        sys.exit(
            f"error: {place}: must be a command or a file that can be written, got"
            f" {error.strerror!r}. Correct it."
        )


def _run(
    command: Sequence[str], env: Mapping[str, str], log: Log, signals: Signals
) -> int:
    """Runs all processes, and starts them again as often as --restarts says."""
    for attempt in range(_RESTARTS.value + 1):
        status = run_once(
            command, _NUM_PROCESSES.value, env, log, signals, _GRACE.value
        )
        again = status == REQUEUE or processes.is_signal(status)
        if not again or signals.any or attempt == _RESTARTS.value:
            break
        log.say(f"status {status}: restart {attempt + 1} of {_RESTARTS.value}")
    return status


if __name__ == "__main__":
    app.run(main)
