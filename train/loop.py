"""The one training loop. Its order, once and for all, at every step n:

evaluate -> save -> sample ranks, forward, backward, update (one jitted step) -> log ->
change (shrink, end a phase)

Evaluation and the checkpoint see the state before the step, so a run that starts again
from a checkpoint does what the one that wrote it did next. Everything random is a
function of the seed and the step. Changes are the only place where shapes change.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from train import checks, evaluation, step
from train.config import pairs, to_json
from train.data import augmentation, pipeline
from train.phases import Phase, build_phases
from train.report import logs
from train.session import Session
from train.state import build_model, factorize, load_model, model_cost
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
      ValueError: The config does not hold together (found before any work).
      FloatingPointError: A loss that is not finite, naming the steps.
      Interrupted: SIGTERM came; the state is saved.
    """
    config = to_json(config)
    workdir = Path(workdir)
    saved = checks.check_workdir(workdir, config)
    data = pipeline.load_data(config["data"], allow_imports=None)
    batch_size = config["data"]["batch_size"]
    prepare = _make_prepare(config, data.image_shape[-1])
    plan = build_phases(config, data.steps_per_epoch(batch_size))
    if saved is None:
        model = _initial_model(config, data)
        checks.check_phases(plan, model, config, data)
    else:
        model = load_model(saved, allow_imports=None)
    _describe(config, data, model, plan, saved)

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    session = Session(config, data, prepare, model, saved)
    step = saved.step if saved else 0
    writer = logs.MetricWriter(workdir, start_step=step)
    metrics_log = logs.StepMetrics(writer, batch_size)
    progress = logs.Progress(session.last_step(), start=step)
    saver = checkpoint.CheckpointWriter(
        workdir / "checkpoints", keep=config["keep_checkpoints"]
    )
    batches = pipeline.prefetch(
        data.train_batches(batch_size, seed=config["seed"], start_step=step)
    )
    frontier: list[evaluation.Figures] = []

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
                progress.update(step, _summary(frontier))
            due = on_epoch and _due(config["checkpoint_every_epochs"], epoch)
            if fresh and (finished or due or stop.requested):
                metrics_log.flush()  # a loss that is not finite is never saved
                metadata = {**_metadata(config, data), "run": session.memory}
                saver.save(step, session.model(), metadata, session.items())
            if finished:
                break
            if stop.requested:
                raise Interrupted(f"stopped at step {step}; run it again to go on.")

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


def _make_prepare(config: Mapping[str, Any], channels: int) -> Callable[..., Any]:
    """From pixels to the model's input: augmented with a key, plain without one."""
    for key in ("mean", "std"):
        values = config["data"][key]
        if len(values) not in (1, channels):
            raise UserError(
                f"config.data.{key}: must hold one number, or one for each of"
                f" {channels} channels, got {values}. Correct it."
            )
    normalize = step.normalize(config["data"]["mean"], config["data"]["std"])
    change = augmentation.make_augment(
        pairs(config["data"]["augment"], "config.data.augment")
    )

    def prepare(key: jax.Array | None, images: jax.Array) -> jax.Array:
        return normalize(images if key is None else change(key, images))

    return prepare


def _initial_model(config: Mapping[str, Any], data: pipeline.Dataset) -> nnx.Module:
    """The model to start from: `init_from`'s, or a new one."""
    if not config["init_from"]:
        return build_model(
            config, data.image_shape, data.num_classes, allow_imports=None
        )
    saved = checkpoint.open_checkpoint(config["init_from"], flag="config.init_from")
    theirs, inputs = saved.metadata["config"], _metadata(config, data)["inputs"]
    if (theirs["model"], saved.metadata["inputs"]) != (config["model"], inputs):
        raise UserError(
            "config.init_from: must be a checkpoint of the same model, got"
            f" {theirs['model']} for {saved.metadata['inputs']}, here"
            f" {config['model']} for {inputs}. Correct config.model or the path."
        )
    model = load_model(saved, allow_imports=None)
    model = factorize(model, config)
    checks.check_same_layers(model, config, data)
    return model


def _describe(
    config: Mapping[str, Any],
    data: pipeline.Dataset,
    model: nnx.Module,
    plan: list[Phase],
    saved: checkpoint.Saved | None,
) -> None:
    cost = model_cost(model, data.image_shape)
    ranks = get_ranks(model)
    name, sizes = config["data"]["name"], data.sizes
    logs.say(f"{name}: {', '.join(f'{n} {split}' for split, n in sizes.items())}")
    logs.say(
        f"{config['model']['name']}: {cost.dense_params:,} parameters and"
        f" {cost.dense_macs:,} MACs when dense; low-rank layers {ranks}"
    )
    for phase in plan:
        most = "at most " if phase.condition else ""
        logs.say(f"phase {phase.name}: steps {phase.start} to {most}{phase.end}")
    if saved:
        logs.say(f"resuming at step {saved.step}")


def _due(every: int, epoch: int) -> bool:
    return every > 0 and epoch % every == 0


def _by_fraction(frontier: list[evaluation.Figures]) -> dict[str, Any]:
    keys = ("accuracy", "loss", "params", "macs")
    return {str(row["rank_fraction"]): {k: row[k] for k in keys} for row in frontier}


def _summary(frontier: list[evaluation.Figures]) -> str:
    parts = [f"{row['accuracy']:.4f} at {row['rank_fraction']:g}" for row in frontier]
    return "validation " + ", ".join(parts) if parts else ""


def _metadata(config: Mapping[str, Any], data: pipeline.Dataset) -> dict[str, Any]:
    shape = {"image_shape": list(data.image_shape), "num_classes": data.num_classes}
    return {"config": dict(config), "inputs": shape}
