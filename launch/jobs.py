"""The folder of a sweep and those of its jobs: all that a sweep knows is in files.

    DIR/sweep.json               {"command", "config", "program", "jobs": {NAME:
                                 {"config", "overrides", "values"}}}
    DIR/jobs/NAME/config.json    the whole config of the job
    DIR/jobs/NAME/workdir/       train.main's
    DIR/jobs/NAME/log.txt        what it said, attempt after attempt
    DIR/jobs/NAME/result.json    its last line: it is done, and never started again
    DIR/jobs/NAME/failed.json    {"status", "message"}: a restart does not mend it
    DIR/jobs/NAME/.lock          held by the sweep that runs it
    DIR/.lock                    held for moments, to write what is of all jobs
    DIR/results.json, table.txt, sweep.png   what was gathered

A file is written whole or not at all. What is neither done nor failed is started, and
goes on from its last checkpoint.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.grid import Job
from lowrank_jax.errors import MissingFile, UserError
from train import folders, schema

DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"


class Sweep(NamedTuple):
    """A sweep that is in its folder.

    Args:
      folder: Where it is.
      program: The module that each job runs.
      jobs: Its jobs by name, in order.
    """

    folder: Path
    program: str
    jobs: dict[str, Job]

    def job_folder(self, name: str) -> Path:
        """Returns the folder of a job."""
        return self.folder / "jobs" / name

    def command(self, name: str) -> list[str]:
        """Returns what a job runs."""
        job, workdir = self.jobs[name], self.job_folder(name) / "workdir"
        words = [f"--config={job.config}", *job.overrides, f"--workdir={workdir}"]
        return [sys.executable, "-m", self.program, *words]

    def state(self, name: str) -> str:
        """Returns whether a job is done, failed, running or waiting."""
        folder = self.job_folder(name)
        if (folder / "result.json").exists():
            return DONE
        if (folder / "failed.json").exists():
            return FAILED
        return WAITING if folders.owner(folder) is None else RUNNING

    def is_over(self, name: str) -> bool:
        """Returns whether a job needs no start."""
        return self.state(name) in (DONE, FAILED)

    def result(self, name: str) -> Any:
        """Returns what a job that is done ended with."""
        return json.loads((self.job_folder(name) / "result.json").read_text())

    def forget_failure(self, name: str) -> None:
        """Makes a failed job one that waits."""
        (self.job_folder(name) / "failed.json").unlink(missing_ok=True)

    def failure(self, name: str) -> str:
        """Returns why a job failed, in one line."""
        file = self.job_folder(name) / "failed.json"
        return json.loads(file.read_text())["message"]


def create(
    folder: Path,
    *,
    config: str,
    program: str,
    jobs: Mapping[str, Job],
    configs: Mapping[str, Mapping[str, Any]],
) -> Sweep:
    """Writes a new sweep, or goes on with the same one.

    Args:
      folder: Where.
      config: As the command gave it.
      program: The module that each job runs.
      jobs: By name.
      configs: Of each job, whole.

    Raises:
      UserError: The folder holds another sweep, or something else.
    """
    described = {
        "command": sys.argv,
        "config": config,
        "program": program,
        "jobs": {name: job._asdict() for name, job in jobs.items()},
    }
    described = json.loads(json.dumps(described))
    sweep = Sweep(folder, program, dict(jobs))
    folders.check_writable(folder)
    with alone(folder):
        if (folder / "sweep.json").exists():
            _check_same(folder, described, configs)
            return sweep
        if {path.name for path in folder.iterdir()} - {"jobs", folders.LOCK}:
            raise UserError(
                f"must be a new folder or one of a sweep, got {folder}, which holds"
                " other files. Nothing is overwritten; name another."
            )
        for name, values in configs.items():
            sweep.job_folder(name).mkdir(parents=True, exist_ok=True)
            text = json.dumps(values, indent=1, sort_keys=True)
            folders.write_atomically(sweep.job_folder(name) / "config.json", text)
        # the last: a sweep is there when all of it is
        folders.write_atomically(folder / "sweep.json", json.dumps(described, indent=1))
    return sweep


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other sweep writes files that all jobs share, and keeps it so."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(folders.lock(folder))
                break
            except UserError as error:
                if error.__cause__ is not None:  # a disk without locks
                    raise
        yield


def _check_same(
    folder: Path, described: Mapping[str, Any], configs: Mapping[str, Any]
) -> None:
    """Refuses to go on with another sweep, naming what differs."""
    theirs = _read(folder)
    there, here = theirs["jobs"].keys(), described["jobs"].keys()
    lines = [f"job {name}: there, not here" for name in there - here]
    lines += [f"job {name}: here, not there" for name in here - there]
    for key in ("config", "program"):
        lines += schema.difference(theirs[key], described[key], key)
    for name in sorted(there & here):
        text = (folder / "jobs" / name / "config.json").read_text()
        differing = schema.difference(json.loads(text), configs[name])
        lines += [f"job {name}: {line}" for line in differing]
    if lines:
        raise UserError(
            f"must hold the same sweep, got {folder} with\n  "
            + "\n  ".join(sorted(lines))
            + "\nName a new folder."
        )


def read(folder: Path) -> Sweep:
    """Reads the sweep of a folder.

    Raises:
      UserError: There is none, or its file is damaged.
    """
    described = _read(folder)
    jobs = {
        name: Job(job["config"], tuple(job["overrides"]), job["values"])
        for name, job in described["jobs"].items()
    }
    return Sweep(folder, described["program"], jobs)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.json"
    if not file.exists():
        raise MissingFile(
            f"must be the folder of a sweep, got {folder} without sweep.json. Correct"
            " the path, or start the sweep with --config and --grid."
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"{file}: must be JSON, got text that is not ({error}). It is damaged; name"
            " another folder."
        ) from error


def last_line(file: Path) -> str:
    """Returns the last line of a text that is not empty; "" without one."""
    lines: Sequence[str] = []
    if file.exists():
        lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
