"""The one training loop. Its order, once and for all, at every step n:

evaluate -> save -> sample ranks, forward, backward, update (one jitted step) -> log ->
change (shrink, end a phase)

Evaluation and the checkpoint see the state before the step, so a run that starts again
from a checkpoint does what the one that wrote it did next. Everything random is a
function of the seed and the step. Changes are the only place where shapes change.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax import checkpoint, errors
from train import folders
from train.evaluation import Figures
from train.report import logs
from train.session import Session
from train.start import start_run
from train.stopping import Interrupted, StopRequest


def train_and_evaluate(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Trains a config in a workdir, or goes on with the run that is there.

    Args:
      config: A `ConfigDict` or mapping as in `configs/`.
      workdir: Folder of the run; a new one, or one that holds a run of the same config.

    Returns:
      The figures of the last evaluation on the validation split: a list of rows, one
      for each fraction of `config.eval_fractions`, under "frontier", and the step.

    Raises:
      UserError: The config does not hold together (found before any work).
      FloatingPointError: A loss that is not finite, naming the steps.
      Interrupted: SIGTERM came; the state is saved.
    """
    workdir = Path(workdir)
    run, plan, model, saved = start_run(config, workdir)
    config = run.config
    session = Session(run, plan, model, saved)
    step = saved.step if saved else 0
    writer = logs.MetricWriter(workdir, start_step=step)
    metrics_log = logs.StepMetrics(writer, run.batch_size, saved_step=saved and step)
    progress = logs.Progress(session.last_step(), start=step)
    saver = checkpoint.CheckpointWriter(
        workdir / "checkpoints", keep=config["keep_checkpoints"]
    )
    batches = run.batches_from(step)
    frontier: list[Figures] = []

    with contextlib.ExitStack() as resources:
        for resource in (saver, writer, progress, batches):  # however the run ends
            resources.enter_context(contextlib.closing(resource))
        stop = resources.enter_context(StopRequest())
        while True:
            finished = session.finished(step)
            fresh = saved is None or step > saved.step
            on_epoch = fresh and step > 0 and step % session.steps_per_epoch == 0
            epoch = step // session.steps_per_epoch

            if finished or (on_epoch and _due(config["eval_every_epochs"], epoch)):
                metrics_log.flush()
                frontier = session.frontier()
                if fresh and frontier:
                    writer.write(step, {"validation": _by_fraction(frontier)})
                progress.update(step, _summary(frontier, run.task.headline))
            due = on_epoch and _due(config["checkpoint_every_epochs"], epoch)
            if fresh and (finished or due or stop.requested):
                metrics_log.flush()  # a loss that is not finite is never saved
                with errors.at("--workdir"):
                    folders.check_space(workdir, session.num_bytes())
                metadata = {**run.metadata(), "run": session.memory}
                saver.save(step, session.model(), metadata, session.state.items())
                metrics_log.saved_step = step
            if finished:
                break
            if stop.requested:
                raise Interrupted(f"stopped at step {step}; run it again to go on.")

            if session.compiles:
                progress.compiling(step)
                metrics_log.compiling()
            metrics = session.train_step(step, next(batches))
            step += 1
            metrics_log.add(step, metrics)
            if step % config["log_every_steps"] == 0:
                progress.update(step, metrics_log.flush())
            if session.changes(step):
                metrics_log.flush()  # nothing is made of a model that is not finite
                session.change(step)
                progress.total = session.last_step()

    return {"step": step, "frontier": frontier}


def _due(every: int, epoch: int) -> bool:
    return every > 0 and epoch % every == 0


def _by_fraction(frontier: Sequence[Figures]) -> dict[str, Any]:
    """The figures of a frontier by its fractions, without the ranks."""
    hidden = ("rank_fraction", "ranks")
    return {
        str(row["rank_fraction"]): {k: v for k, v in row.items() if k not in hidden}
        for row in frontier
    }


def _summary(frontier: Sequence[Mapping[str, Any]], headline: str) -> str:
    parts = [f"{row[headline]:.4f} at {row['rank_fraction']:g}" for row in frontier]
    return f"validation {headline} " + ", ".join(parts) if parts else ""
