"""Attempts at the campaign's run: what is asked of the server, what became of it."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CONFIG = "tests/faults/config.py"


class Kill(NamedTuple):
    """A signal to some processes of an attempt.

    Args:
      signal: Its name.
      processes: Which get it.
      place: Of `moments.PLACES`, or "any time".
      number: The moment of the place, or seconds for "any time".
    """

    signal: str
    processes: Sequence[int]
    place: str
    number: float


class Outcome(NamedTuple):
    """What became of an attempt.

    Args:
      statuses: The exit status of each process; minus a signal's number.
      ended: When each ended, in seconds.
      struck: Where the signal was raised; "" if it never was.
      struck_after: When, in seconds; None if never.
      out: What each printed.
      err: What each printed on stderr.
      counts: How many moments each place had, where nothing struck.
      timed_out: Whether it had to be ended.
    """

    statuses: list[int]
    ended: list[float]
    struck: str
    out: list[str]
    err: list[str]
    counts: Mapping[str, int]
    timed_out: bool

    @property
    def done(self) -> bool:
        """Returns whether the run came to its end."""
        return not any(self.statuses)


class Server:
    """A process that starts attempts; see `tests.faults.server`.

    Args:
      config: The config that it trains.
      log: File for what it says itself.
      cache: Folder of compiled programs.
    """

    def __init__(self, config: str, log: Path, cache: Path):
        self._config = config
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("a") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.faults.server"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )
        assert self._answer() == "ready"

    def attempt(
        self,
        workdir: Path,
        log: Path,
        *,
        processes: int = 1,
        kill: Kill | None = None,
        timeout: float = 300.0,
    ) -> Outcome:
        """Starts the run, or goes on with it.

        Args:
          workdir: Its folder.
          log: Where the logs go, a path to which endings are added.
          processes: How many.
          kill: The fault, if there is one.
          timeout: Seconds after which it is ended.
        """
        words = [f"--config={self._config}", f"--workdir={workdir}"]
        each = [words]
        if processes > 1:
            words += [f"--coordinator=127.0.0.1:{_free_port()}"]
            words += [f"--num_processes={processes}", "--coordinator_timeout=45"]
            each = [[*words, f"--process_id={n}"] for n in range(processes)]
        by_time = kill is not None and kill.place == "any time"
        about = {
            "processes": each,
            "workdir": str(workdir),
            "log": str(log),
            "signal": kill.signal if kill else "SIGKILL",
            "kill": list(kill.processes) if kill else [],
            "kill_after": kill.number if by_time else None,
            "place": kill.place if kill and not by_time else "",
            "number": kill.number if kill else 0,
            "timeout": timeout,
        }
        self._process.stdin.write(json.dumps(about) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        reports = [_report(Path(f"{log}.{n}.moments")) for n in range(processes)]
        struck = [report["struck"] for report in reports if report["struck"]]
        if answer["sent"]:
            struck.append(f"after {kill.number:.2f} s")
        texts = {
            ending: [Path(f"{log}.{n}.{ending}").read_text() for n in range(processes)]
            for ending in ("out", "err")
        }
        return Outcome(
            answer["statuses"],
            answer["ended"],
            ", ".join(struck),
            **texts,
            counts=reports[0]["counts"],
            timed_out=answer["timed_out"],
        )

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the campaign's server has ended; see its log")
        return json.loads(line)

    def close(self) -> None:
        """Ends the server."""
        with self._process:  # closes its pipes, which ends it, and waits
            pass


def choose_moment(
    rng: random.Random, place: str, counts: Mapping[str, int], seconds: float
) -> float:
    """Draws a moment of a place.

    Args:
      rng: What to draw from.
      place: As of `Kill`.
      counts: How many moments the undisturbed run had of each place.
      seconds: How long it took.
    """
    if place == "any time":
        return rng.uniform(0.0, 0.8 * seconds)  # no run is as fast as every other
    whole = rng.randint(1, counts[place])
    return whole + rng.random() if place == "writing" else whole


def _report(file: Path) -> dict[str, Any]:
    if not file.exists():  # killed before
        return {"struck": "", "counts": {}}
    return json.loads(file.read_text())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
