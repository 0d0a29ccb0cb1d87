"""Starts the campaign's attempts: a process that has imported all, and forks for each.

A line of JSON on stdin is an attempt, a line on stdout what became of it. An attempt is
`train.main` as `python -m` runs it, in one process or in several; this program kills
them when they are to be killed, and all of them when their time is up. No JAX backend
is started here: each child has one of its own.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.moments import Moments

_SECONDS_BETWEEN_LOOKS = 0.005


def serve() -> None:
    """Runs the attempts that stdin asks for, one after the other."""
    import sklearn.datasets  # noqa: F401  (seconds, once)

    import lowrank_jax.storage  # noqa: F401
    import train.checkpoints  # noqa: F401
    import train.loop  # noqa: F401

    gc.freeze()  # else each fork spends a second on collecting all of this
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_attempt(json.loads(line))), flush=True)


def _attempt(about: dict[str, Any]) -> dict[str, Any]:
    """Runs an attempt; see `tests.faults.attempts.Attempt` for what it is about."""
    began = time.monotonic()
    children = {_fork(n, about): n for n in range(len(about["processes"]))}
    statuses: dict[int, int] = {}
    ended: dict[int, float] = {}
    after, kill = about["kill_after"], about["kill"]
    sent = timed_out = False
    while children:
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                number = children.pop(pid)
                statuses[number] = os.waitstatus_to_exitcode(status)
                ended[number] = time.monotonic() - began
        seconds = time.monotonic() - began
        if after is not None and not sent and seconds >= after:
            sent = any(number in kill for number in children.values())
            _send([pid for pid, n in children.items() if n in kill], about["signal"])
            after = after if sent else None
        if seconds > about["timeout"]:
            timed_out = True
            _send(list(children), "SIGKILL")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return {
        "statuses": [statuses[n] for n in sorted(statuses)],
        "ended": [ended[n] for n in sorted(ended)],
        "sent": sent,
        "timed_out": timed_out,
    }


def _send(pids: list[int], name: str) -> None:
    for pid in pids:  # they are our children and not waited for: the numbers are theirs
        os.kill(pid, getattr(signal, name))


def _fork(number: int, about: dict[str, Any]) -> int:
    """Starts one process of an attempt."""
    pid = os.fork()
    if pid:
        return pid
    log = f"{about['log']}.{number}"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, ending in ((1, "out"), (2, "err")):
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(f"{log}.{ending}", flags, 0o644), stream)
    inside = number in about["kill"]
    moments = Moments(
        Path(f"{log}.moments"),
        about["place"] if inside else "",
        about["number"],
        about["signal"],
    )
    moments.install(Path(about["workdir"]) / "checkpoints")
    sys.argv = ["train.main", *about["processes"][number]]
    runpy.run_module("train.main", run_name="__main__", alter_sys=True)
    os._exit(0)


if __name__ == "__main__":
    serve()
