"""Child processes that never outlive their parent, and what their ends mean."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import IO

REQUEUE = 75
"""The status of a run that saved what it had: start it again (`train.stopping`)."""

_SECONDS_BETWEEN_LOOKS = 0.05
_STARTER = """
import ctypes, os, sys

parent, cpus, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: kept by what follows
if os.getppid() != int(parent):  # it ended before the line above
    sys.exit(1)
if cpus:
    os.sched_setaffinity(0, map(int, cpus.split(",")))
os.execvp(command[0], command)
"""
"""What a child runs before it becomes the command.

Python's `preexec_fn` would run it between fork and exec, where the threads of a parent
that has imported JAX may hold locks for ever.
"""

Process = subprocess.Popen


def start(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    stdout: int | IO | None = None,
    stderr: int | IO | None = None,
    cpus: Collection[int] = (),
) -> Process:
    """Starts a command that the kernel kills when this process ends, however it ends.

    It is the head of a process group of its own: what comes from the keyboard reaches
    this process alone. Outside Linux, where the kernel does not do this, it outlives a
    parent that was killed. To be called in the main thread: the kernel counts the end
    of the thread that started it as the parent's.

    Args:
      command: Program and arguments.
      env: The whole environment.
      stdout: As for `subprocess.Popen`.
      stderr: As for `subprocess.Popen`.
      cpus: The cores it may use, as numbers; all of the parent's if empty.

    Raises:
      FileNotFoundError: The program is not there.
    """
    if shutil.which(command[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    if sys.platform == "linux":
        numbers = ",".join(map(str, cpus))
        starter = [sys.executable, "-I", "-S", "-c", _STARTER]
        command = [*starter, str(os.getpid()), numbers, *command]
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
    )


def status(process: Process) -> int | None:
    """Returns the exit status as a shell counts it, 128 + n for signal n; None while it
    runs."""
    code = process.poll()
    return 128 - code if code is not None and code < 0 else code


def is_signal(status: int) -> bool:
    """Returns whether a status says that a signal ended the process."""
    return status > 128


def combine(statuses: Sequence[int]) -> int:
    """Returns the status of a run from those of its processes, in order of their ends.

    >>> combine([0, 0]), combine([137, 75]), combine([75, 1]), combine([134, 1, 0])
    (0, 75, 1, 134)
    """
    if REQUEUE in statuses and 1 not in statuses:
        return REQUEUE
    return next((status for status in statuses if status not in (0, REQUEUE)), 0)


def send(processes: Iterable[Process], number: int) -> None:
    """Sends a signal to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def end(processes: Sequence[Process], grace_s: float) -> None:
    """Ends those that still run: SIGTERM and, after a time, SIGKILL to their groups.

    Args:
      processes: What to end.
      grace_s: Seconds between the two signals.
    """
    send(processes, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while time.monotonic() < until and any(p.poll() is None for p in processes):
        pause()
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pause() -> None:
    """Sleeps until it is worth looking at processes again."""
    time.sleep(_SECONDS_BETWEEN_LOOKS)


class Signals:
    """Notes SIGTERM and SIGINT while it is entered, to be passed on.

    `any` says whether one came at all.
    """

    def __init__(self) -> None:
        self._came: list[int] = []
        self.any = False

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, _: object) -> None:
        self._came.append(number)
        self.any = True

    def take(self) -> list[int]:
        """Returns the numbers of the signals that came since the last call."""
        came, self._came = self._came, []
        return came

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
