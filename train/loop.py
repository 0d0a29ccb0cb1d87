"""The one training loop. Its order, once and for all, at every step n:

change what is due (shrink, end a phase) -> evaluate -> save -> sample ranks, forward,
backward, update (one jitted step) -> log

Evaluation and the checkpoint see the state before the step, so a run that starts again
from a checkpoint does what the one that wrote it did next. Everything random is a
function of the seed and the step. Changes are the only place where shapes change. A
stop that comes in the middle of a change or an evaluation breaks it off; the
checkpoint says that it is to be done anew.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train import distributed
from train.report import logs, trackers
from train.report.progress import Progress
from train.saving import Saver
from train.start import start_run
from train.stopping import Interrupted, StopRequested


def train_and_evaluate(
    config: Any,
    workdir: str | Path,
    *,
    further: Sequence[trackers.OpenTracker] = (),
) -> dict[str, Any]:
    """Trains a config in a workdir, or goes on with the run that is there.

    With several processes (`train.distributed`), all call it alike.

    Args:
      config: A `ConfigDict` or mapping as in `configs/`.
      workdir: Folder of the run; a new one, or one that holds a run of the same config.
      further: Trackers of its metrics, beside those of its folder.

    Returns:
      The figures of the last evaluation on the validation split: a list of rows, one
      for each fraction of `config.eval_fractions`, under "frontier", and the step.

    Raises:
      UserError: The config does not hold together (found before any work).
      NotFinite: A loss or a gradient that is not finite, naming step and parameter.
      Interrupted: SIGTERM came, or Ctrl-C to a binary; the state is saved.
    """
    workdir = Path(workdir)
    frontier: list[dict[str, Any]] = []

    with contextlib.ExitStack() as resources:
        session, saved = start_run(config, workdir, resources)
        run = session.run
        config, stop = run.config, resources.enter_context(run.stop)
        step = saved.step if saved else 0
        progress = resources.enter_context(
            Progress(workdir, session.last_step(), start=step)
        )
        writer = logs.MetricWriter(
            workdir, start_step=step, config=config, further=further
        )
        metrics_log = logs.StepMetrics(
            writer, run.batch_size, pace=progress.pace, saved_step=step or None
        )
        saver = Saver(run, workdir, saved)
        batches = run.batches_from(step)
        for resource in (saver, writer, batches):  # however the run ends
            resources.enter_context(contextlib.closing(resource))
        resources.push(distributed.leave_lost_peer)
        if saved is None:
            writer.write(step, {"model": session.size()})
        while True:
            finished = False
            try:
                if session.done["changes_due"]:
                    metrics_log.flush()  # nothing is made of what is not finite
                    progress.doing("changing", step)
                    session.change(step)
                    writer.write(step, {"model": session.size()})
                    progress.total = session.last_step()
                fresh = session.done["evaluated"] != step
                finished = session.finished(step)
                if finished or (fresh and session.evaluates(step)):
                    metrics_log.flush()
                    progress.doing("evaluating", step, **session.about())
                    frontier = session.frontier()
                    if fresh and frontier:
                        writer.write(step, {"validation": _by_fraction(frontier)})
                    session.done["evaluated"] = step
                    progress.note(figures=_by_fraction(frontier))
                    summary = _summary(frontier, run.task.headline)
                    progress.update(step, summary, at_once=bool(summary))
            except StopRequested:
                finished = False  # what was broken off is done anew
            if (stopping := stop.poll()) or finished or saver.due(step):
                metrics_log.flush()  # a loss that is not finite is never saved
                progress.doing("saving", step)
                judged = session.done["evaluated"] == step
                saver.save(step, session, frontier if judged else [])
                metrics_log.saved_step = saver.saved_step
            if finished:
                break
            if stopping:
                raise Interrupted(f"stopped at step {step}; run it again to go on.")

            count = session.steps_at_once(step, saver.due)
            compiles = session.compiles(step, count)
            if not compiles:
                progress.training(step)
            given = [next(batches) for _ in range(count)]
            if compiles:
                metrics_log.names = session.param_names()
                progress.compiling(step, session.name_of(count), **session.about())
            metrics = session.train_step(step, *given)
            step += count
            metrics_log.add(step, metrics, count)
            if compiles:
                progress.compiled()
                metrics_log.wait()  # the rate is without the first step
            if step % config["log_every_steps"] == 0:
                progress.update(step, metrics_log.flush())
            elif progress.due():
                metrics_log.wait()
                progress.update(step)
            session.done["changes_due"] = session.changes(step)

    return {"step": step, "frontier": frontier}


def _by_fraction(frontier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a frontier by its fractions, without the ranks."""
    hidden = ("rank_fraction", "ranks")
    return {
        str(row["rank_fraction"]): {k: v for k, v in row.items() if k not in hidden}
        for row in frontier
    }


def _summary(frontier: Sequence[Mapping[str, Any]], headline: str) -> str:
    parts = [f"{row[headline]:.4f} at {row['rank_fraction']:g}" for row in frontier]
    return f"validation {headline} " + ", ".join(parts) if parts else ""
