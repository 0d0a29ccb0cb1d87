"""Runs one job of a sweep: what an element of a Slurm array does.

`python -m launch.job --sweep=DIR --index=3` runs the fourth job of DIR/sweep.json and
ends with 0 (done, now or before), 1 (failed) or 75 (to be started again). In several
tasks of Slurm, the first one keeps the job's files.
"""

import os
from pathlib import Path

from absl import flags

from launch import jobs, pool
from launch.processes import Signals
from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import binary
from train.stopping import Interrupted

_SWEEP = flags.DEFINE_string("sweep", None, "Folder of the sweep.")
_INDEX = flags.DEFINE_integer(
    "index", None, "Which job, from 0; $SLURM_ARRAY_TASK_ID if not given."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether the job runs in the tasks that Slurm has started."
)


def _main() -> None:
    with errors.at("--sweep"):
        sweep = jobs.read(Path(_SWEEP.value))
    index = _INDEX.value
    if index is None:
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", -1))
    if not 0 <= index < len(sweep.jobs):
        raise UserError(
            f"--index: must be in [0, {len(sweep.jobs) - 1}], got {index}. Correct it;"
            " in an array of Slurm it is set."
        )
    name = list(sweep.jobs)[index]
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    arguments = ["--distributed"] if _DISTRIBUTED.value and tasks > 1 else []
    if int(os.environ.get("SLURM_PROCID", 0)) > 0 and not sweep.is_over(name):
        command = [*sweep.command(name), *arguments]
        os.execv(command[0], command)
    with Signals() as signals:
        left = pool.run(
            sweep, [name], signals, slots=1, restarts=0, arguments=arguments
        )
    if left:
        raise Interrupted(f"{name}: run it again to go on.")
    if sweep.state(name) == jobs.FAILED:
        raise UserError(f"{name}: must end with status 0, got {sweep.failure(name)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("sweep")
    binary.run(_main)
