"""Runs the jobs of a sweep on this machine, some at a time, each by one process.

A job is locked while it runs, so that several sweeps over one folder share its jobs and
run none twice. How a job ended is in its folder before its lock is given up.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from launch import jobs, processes
from launch.jobs import Sweep
from launch.processes import REQUEUE, Process, Signals
from lowrank_jax.errors import UserError
from train import folders
from train.report import logs

OUTPUT = "stdout.txt"
"""Where a job's stdout is until its last line is read."""


class _Running(NamedTuple):
    """A job that runs.

    Args:
      name: Of the job.
      process: Which runs it.
      resources: Its lock and its files.
    """

    name: str
    process: Process
    resources: contextlib.ExitStack


def run(
    sweep: Sweep,
    names: Sequence[str],
    signals: Signals,
    *,
    slots: int,
    restarts: int,
    arguments: Sequence[str] = (),
) -> list[str]:
    """Runs jobs until each is done or failed, here or in another sweep.

    Args:
      sweep: The sweep.
      names: Of the jobs.
      signals: What is passed on to all that run; after one, none is started.
      slots: How many run at a time; they share the cores.
      restarts: How often a job is started again that ends with 75 or by a signal.
      arguments: Further ones of each job.

    Returns:
      The jobs that are neither done nor failed: stopped, or ended too often.
    """
    waiting = list(names)
    left: list[str] = []
    ends: dict[str, int] = {}
    running: dict[int, _Running] = {}
    with contextlib.ExitStack() as all_resources:
        all_resources.callback(_end_all, running)
        while waiting or running:
            for number in signals.take():
                processes.send([job.process for job in running.values()], number)
            if signals.any:
                left, waiting = left + waiting, []
            waiting = [name for name in waiting if not sweep.is_over(name)]
            for slot in sorted(set(range(slots)) - running.keys()):
                started = _start_one(sweep, waiting, _cores(slot, slots), arguments)
                if started is not None:
                    waiting.remove(started.name)
                    running[slot] = started
            for slot, job in list(running.items()):
                status = processes.status(job.process)
                if status is None:
                    continue
                with job.resources:
                    _finish(sweep, job.name, status)
                del running[slot]
                if sweep.is_over(job.name):
                    continue
                ends[job.name] = ends.get(job.name, 0) + 1
                again = ends[job.name] <= restarts
                (waiting if again else left).append(job.name)
            processes.pause()
    return left


def _end_all(running: dict[int, _Running]) -> None:
    """Leaves nothing behind after an error of our own."""
    processes.end([job.process for job in running.values()], 0.0)
    for job in running.values():
        job.resources.close()


def _cores(slot: int, slots: int) -> list[int]:
    """The cores of a slot: a share of those of this process; none if unknown."""
    if not hasattr(os, "sched_getaffinity"):  # outside Linux
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // slots
    return cores[slot * share : (slot + 1) * share] or cores


def _start_one(
    sweep: Sweep, waiting: Sequence[str], cores: Sequence[int], arguments: Sequence[str]
) -> _Running | None:
    """Starts the first job that nobody else runs."""
    for name in waiting:
        folder = sweep.job_folder(name)
        # A killed sweep's job may take a moment to die after its sweep.
        if folders.owner(folder) or folders.owner(folder / "workdir"):
            continue
        with contextlib.ExitStack() as resources:
            try:
                resources.enter_context(folders.lock(folder))
            except UserError as error:
                if error.__cause__ is not None:  # a disk without locks
                    raise
                continue  # another sweep was faster
            if sweep.is_over(name):
                continue
            log = resources.enter_context((folder / "log.txt").open("ab"))
            output = resources.enter_context((folder / OUTPUT).open("wb"))
            # what asks for threads by number gets the share as well
            threads = {"OMP_NUM_THREADS": str(len(cores))} if cores else {}
            process = processes.start(
                [*sweep.command(name), *arguments],
                {**threads, **os.environ},
                stdout=output,
                stderr=log,
                cpus=cores,
            )
            logs.say(f"{name}: started")
            return _Running(name, process, resources.pop_all())
    return None


def _finish(sweep: Sweep, name: str, status: int) -> None:
    """Writes how a job ended, if it did."""
    folder = sweep.job_folder(name)
    if status == REQUEUE or processes.is_signal(status):
        logs.say(f"{name}: stopped with status {status}, to be started again")
        return
    message = jobs.last_line(folder / "log.txt")
    if status == 0:
        text = jobs.last_line(folder / OUTPUT)
        try:
            json.loads(text)
        except ValueError:
            message = f"its last line is not JSON: {text!r}"
        else:
            folders.write_atomically(folder / "result.json", text + "\n")
            (folder / OUTPUT).unlink()
            logs.say(f"{name}: done")
            return
    failure = json.dumps({"status": status, "message": message}, indent=1)
    folders.write_atomically(folder / "failed.json", failure)
    logs.say(f"{name}: failed with status {status}: {message}")
