"""What a run starts from: its parts, checked before any work, and its session."""

import contextlib
from pathlib import Path
from typing import Any

from lowrank_jax import checkpoint
from train import checks, workdirs
from train.initial import initial_model
from train.preparing import prepare
from train.report import description
from train.resuming import resume
from train.session import Session


def start_run(
    config: Any, workdir: Path, resources: contextlib.ExitStack
) -> tuple[Session, checkpoint.Saved | None]:
    """Opens a run; the workdir is made, and says what config it is of.

    Args:
      config: A `ConfigDict` or mapping as in `configs/`.
      workdir: Folder of the run; a new one, or one that holds a run of the same config.
      resources: Hold the workdir until they are closed.

    Returns:
      The session, and the checkpoint that it goes on from, if there is one.

    Raises:
      UserError: Something does not hold together; nothing was written.
    """
    workdirs.own(workdir, resources)
    run, plan = prepare(config)
    if steps := workdirs.steps_of(workdir, run.config):
        session, saved = resume(run, plan, steps)
    else:
        model, saved = initial_model(run), None
        with description.checking(plan):
            checks.check_phases(run, plan, model)
        description.describe(run, plan, model)
        session = Session(run, plan, model, None)
    workdirs.write_config(workdir, run.config)
    return session, saved
