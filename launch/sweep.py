"""Trains a config at every point of a grid, and gathers the results.

`python -m launch.sweep --config=configs/maestro.py:smoke --grid=lasso=1e-3,1e-2
--grid=config.seed=0,1 --output=DIR --jobs=2` runs the product of the grids, each job as
a train.main of its own. The same command goes on with a sweep that ended in whatever
way: what is done stays, what was stopped goes on from its last checkpoint.
`launch.grid` has the syntax of grids, `launch.jobs` the layout of DIR.

Ends with one line of JSON: `{"sweep", "jobs": {NAME: state}, "picture"}`. The exit
status is 0 if all jobs are done, 1 if one failed, 75 if some are left to be started
again.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import gather, grid, jobs, pool
from launch.jobs import Sweep
from launch.processes import Signals
from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import binary
from train.report import logs
from train.stopping import Interrupted

_CONFIG = flags.DEFINE_string(
    "config", None, "Config file, with :argument after it, that all jobs begin with."
)
_GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    "KEY=VALUE,VALUE,...: a place in the config (config.seed=0,1) or one of its"
    " arguments (lasso=1e-3,1e-2). Several grids make a product.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the sweep.")
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "How many run at a time on this machine.", lower_bound=1
)
_RESTARTS = flags.DEFINE_integer(
    "restarts",
    3,
    "How often to start a job again that ended with status 75 or by a signal.",
    lower_bound=0,
)
_RETRY = flags.DEFINE_bool("retry_failed", False, "Start failed jobs again, too.")
_PROGRAM = flags.DEFINE_string(
    "program",
    "train.main",
    "Module that each job runs, with the flags and the last line of train.main.",
)
_SLURM = flags.DEFINE_bool(
    "slurm", False, "Submit the jobs as one array to Slurm, by launch/slurm.sbatch."
)
_SBATCH = flags.DEFINE_string(
    "sbatch_args", "", "With --slurm: for sbatch, such as '--gpus-per-task=1'."
)
_GATHER = flags.DEFINE_bool("gather", False, "Start nothing: table and picture alone.")


def open_sweep() -> Sweep:
    """Returns the sweep that the flags describe, new or gone on with.

    Raises:
      UserError: A grid or a config is wrong; nothing was written.
    """
    folder = Path(_OUTPUT.value)
    with errors.at("--output"):
        if _GATHER.value and _CONFIG.value is None:
            return jobs.read(folder)
    if _CONFIG.value is None or not _GRID.value:
        raise UserError(
            "--config, --grid: must be given, got none. Add them, or --gather for the"
            " results of a sweep that is there."
        )
    found = grid.product(_CONFIG.value, [grid.parse(text) for text in _GRID.value])
    configs = grid.build_configs(found)
    with errors.at("--output"):
        return jobs.create(
            folder,
            config=_CONFIG.value,
            program=_PROGRAM.value,
            jobs=found,
            configs=configs,
        )


def run_here(sweep: Sweep) -> list[str]:
    """Runs what is neither done nor failed on this machine; returns what is left."""
    with Signals() as signals:
        return pool.run(
            sweep,
            list(sweep.jobs),
            signals,
            slots=_JOBS.value,
            restarts=_RESTARTS.value,
        )


def submit(sweep: Sweep) -> str:
    """Submits what is neither done nor failed as one array; returns its number.

    Raises:
      UserError: Slurm is not there, or refuses it.
    """
    names = list(sweep.jobs)
    left = [str(n) for n, name in enumerate(names) if not sweep.is_over(name)]
    script = Path(__file__).with_name("slurm.sbatch")
    command = [
        "sbatch",
        "--parsable",
        f"--array={','.join(left)}",
        f"--output={sweep.folder}/slurm-%A_%a.log",
        *shlex.split(_SBATCH.value),
        str(script),
        *(sys.executable, "-m", "launch.job", f"--sweep={sweep.folder}"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            "--slurm: must run where sbatch is, got none on PATH. Drop --slurm to run"
            " the jobs here."
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(
            f"--slurm: must be what Slurm accepts, got {shlex.join(command)!r}:"
            f" {said}. Correct --sbatch_args."
        )
    return re.split(r"[;\s]", done.stdout.strip())[0]


def _main() -> None:
    binary.check_companions(flags.FLAGS, {"sbatch_args": ["slurm"]})
    sweep = open_sweep()
    left: Sequence[str] = ()
    if not _GATHER.value:
        if _RETRY.value:
            for name in sweep.jobs:
                sweep.forget_failure(name)
        if all(map(sweep.is_over, sweep.jobs)):
            logs.say(f"{sweep.folder}: nothing is left to do")
        elif _SLURM.value:
            number = submit(sweep)
            logs.emit({"sweep": str(sweep.folder), "slurm_job": number})
            return
        else:
            left = run_here(sweep)
    summary = gather.gather(sweep)
    logs.emit(summary)
    _end(sweep, left)


def _end(sweep: Sweep, left: Sequence[str]) -> None:
    """Raises what says that not all is done, after a sweep that ran."""
    failed = [name for name in sweep.jobs if sweep.state(name) == jobs.FAILED]
    if left:
        raise Interrupted(f"{len(left)} jobs are left; run the same command to go on.")
    if failed and not _GATHER.value:
        raise UserError(
            f"jobs: must end with status 0, got another for {failed}. See log.txt in"
            f" {sweep.folder}/jobs/; --retry_failed starts them again."
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    binary.run(_main)
