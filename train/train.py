"""The one training loop. Its order, once and for all, at every step n:

evaluate -> save -> sample ranks, forward, backward, update (one jitted step) -> log ->
shrink

Evaluation and the checkpoint see the state before the step, so a run that starts again
from a checkpoint does what the one that wrote it did next. Everything random is a
function of the seed and the step. Shrinking is the only place where shapes change.
"""

import contextlib
import functools
import json
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lowrank_jax import checkpoint, shrinking, surgery
from train import augment, input_pipeline, logs, steps
from train import config as config_lib
from train import evaluation as evaluation_lib
from train import phases as phases_lib
from train import state as state_lib


class Interrupted(RuntimeError):
    """The process was asked to stop (SIGTERM) and has saved its state."""


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
    config = config_lib.to_json(config)
    workdir = Path(workdir)
    saved = _check_workdir(workdir, config)
    data = input_pipeline.load_data(config["data"], allow_imports=None)
    batch_size = config["data"]["batch_size"]
    steps_per_epoch = data.steps_per_epoch(batch_size)
    phases = phases_lib.build_phases(config, steps_per_epoch)
    total_steps = phases[-1].end
    prepare = _make_prepare(config, data.image_shape[-1])
    root_key = jax.random.key(config["seed"])
    model = _initial_model(config, data, saved)
    _check_phases(phases, model, batch_size)
    _describe(config, data, model, phases, saved)

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    step = saved.step if saved else 0
    writer = logs.MetricWriter(workdir, start_step=step)
    metrics_log = logs.StepMetrics(writer, batch_size)
    progress = logs.Progress(total_steps, start=step)
    saver = checkpoint.CheckpointWriter(
        workdir / "checkpoints", keep=config["keep_checkpoints"]
    )
    frontier: list[evaluation_lib.Figures] = []
    first_phase = phases_lib.phase_at(phases, step)

    with contextlib.ExitStack() as resources:
        for resource in (saver, writer, progress):  # closed however the run ends
            resources.enter_context(contextlib.closing(resource))
        stop = resources.enter_context(_StopRequest())
        for index, phase in enumerate(phases[first_phase:], first_phase):
            structure, state = state_lib.new_state(
                model, phase.optimizer, phase.sampler, step
            )
            if saved and index == first_phase:
                state = _restore(saved, state)
            batches = input_pipeline.prefetch(
                data.train_batches(batch_size, seed=config["seed"], start_step=step)
            )
            train_step, evaluate = _compile(phase, structure, prepare, root_key)
            while step < phase.end or step == total_steps:
                finished = step == total_steps
                fresh = saved is None or step > saved.step
                on_epoch = fresh and step > 0 and step % steps_per_epoch == 0
                epoch = step // steps_per_epoch

                if finished or (on_epoch and _due(config["eval_every_epochs"], epoch)):
                    metrics_log.flush()
                    model = state_lib.join_model(structure, *state[1:3])
                    frontier = _frontier(config, data, evaluate, model, state)
                    if fresh and frontier:
                        writer.write(step, {"validation": _by_fraction(frontier)})
                    progress.update(step, _summary(frontier))
                due = on_epoch and _due(config["checkpoint_every_epochs"], epoch)
                if fresh and (finished or due or stop.requested):
                    metrics_log.flush()  # a loss that is not finite is never saved
                    model = state_lib.join_model(structure, *state[1:3])
                    saver.save(step, model, _metadata(config, data), _items(state))
                if finished:
                    break
                if stop.requested:
                    raise Interrupted(f"stopped at step {step}; run it again to go on.")

                state, metrics = train_step(state, next(batches))
                step += 1
                metrics_log.add(step, metrics)
                if step % config["log_every_steps"] == 0:
                    progress.update(step, metrics_log.flush())
                if _shrinks(phase, step, steps_per_epoch):
                    metrics_log.flush()
                    shrunk = _shrink(phase, structure, state)
                    if shrunk is not None:
                        structure, state = shrunk
                        train_step, evaluate = _compile(
                            phase, structure, prepare, root_key
                        )
            batches.close()
            model = state_lib.join_model(structure, *state[1:3])

    return {"step": step, "frontier": frontier}


def _make_prepare(config: Mapping[str, Any], channels: int) -> Callable[..., Any]:
    """From pixels to the model's input: augmented with a key, plain without one."""
    for key in ("mean", "std"):
        values = config["data"][key]
        if len(values) not in (1, channels):
            raise ValueError(
                f"config.data.{key}: must hold one number, or one for each of"
                f" {channels} channels, got {values}. Correct it."
            )
    normalize = steps.normalize(config["data"]["mean"], config["data"]["std"])
    change = augment.make_augment(
        config_lib.pairs(config["data"]["augment"], "config.data.augment")
    )

    def prepare(key: jax.Array | None, images: jax.Array) -> jax.Array:
        return normalize(images if key is None else change(key, images))

    return prepare


def _check_workdir(workdir: Path, config: Mapping[str, Any]) -> checkpoint.Saved | None:
    """The latest checkpoint of this config's run in the workdir, if there is one."""
    file = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir: must be a folder, got {workdir}. Name another.")
    if not file.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise ValueError(
                f"--workdir: must be a new folder or one of a run, got {workdir}, which"
                " holds other files. Nothing is overwritten; name another."
            )
        return None
    lines = config_lib.difference(json.loads(file.read_text()), config)
    if lines:
        raise ValueError(
            f"--workdir: must hold a run of the same config, got {workdir} with\n  "
            + "\n  ".join(lines)
            + "\nName a new workdir; config.init_from starts from a checkpoint."
        )
    folder = workdir / "checkpoints"
    if not folder.is_dir() or not any(p.name.isdigit() for p in folder.iterdir()):
        return None
    return checkpoint.open_checkpoint(folder, flag="--workdir")


def _initial_model(
    config: Mapping[str, Any],
    data: input_pipeline.Dataset,
    saved: checkpoint.Saved | None,
) -> nnx.Module:
    """The model to start from: the run's own, `init_from`'s, or a new one."""
    if saved is None and config["init_from"]:
        saved = checkpoint.open_checkpoint(config["init_from"], flag="config.init_from")
        theirs, inputs = saved.metadata["config"], _metadata(config, data)["inputs"]
        if (theirs["model"], saved.metadata["inputs"]) != (config["model"], inputs):
            raise ValueError(
                "config.init_from: must be a checkpoint of the same model, got"
                f" {theirs['model']} for {saved.metadata['inputs']}, here"
                f" {config['model']} for {inputs}. Correct config.model or the path."
            )
        model = state_lib.load_model(saved, allow_imports=None)
        rules = config_lib.pairs(config["rank_rules"], "config.rank_rules")
        model = surgery.factorize(model, rules, where="config.rank_rules")
        _check_same_layers(model, config, data)
        return model
    if saved is not None:
        return state_lib.load_model(saved, allow_imports=None)
    return state_lib.build_model(
        config, data.image_shape, data.num_classes, allow_imports=None
    )


def _check_same_layers(
    model: nnx.Module, config: Mapping[str, Any], data: input_pipeline.Dataset
) -> None:
    """Low-rank layers of `init_from` must be low-rank by the rules as well."""
    wanted = state_lib.abstract_model(
        lambda: state_lib.build_model(
            config, data.image_shape, data.num_classes, allow_imports=None
        )
    )
    extra = sorted({*surgery.find_factors(model)} - {*surgery.find_factors(wanted)})
    if extra:
        raise ValueError(
            "config.rank_rules: layers that are low-rank in config.init_from must be so"
            f" here, got 'dense' for {extra}. Change their rule to 'full'; their ranks"
            " are those of the checkpoint."
        )


def _check_phases(
    phases: list[phases_lib.Phase], model: nnx.Module, batch_size: int
) -> None:
    """Traces every phase's sampler and penalties on the model, before any work."""
    ranks = surgery.get_ranks(model)
    for phase in phases:
        try:
            state = phase.sampler.init(ranks)
            sampled, _ = jax.eval_shape(phase.sampler.sample, state, jax.random.key(0))
            factors = surgery.find_factors(model)
            for penalty in phase.penalties:
                jax.eval_shape(functools.partial(penalty, factors, 0))
        except ValueError as error:
            raise ValueError(f"config.phases ({phase.name}): {error}") from error
        sizes = (
            {rank.shape[-1] for rank in sampled.values()}
            if phase.sampler.per_example
            else set()
        )
        if sizes - {batch_size}:
            raise ValueError(
                f"config.phases ({phase.name}): per_example's batch_size must be"
                f" config.data.batch_size {batch_size}, got {sizes}. Make them equal."
            )


def _describe(
    config: Mapping[str, Any],
    data: input_pipeline.Dataset,
    model: nnx.Module,
    phases: list[phases_lib.Phase],
    saved: checkpoint.Saved | None,
) -> None:
    cost = state_lib.model_cost(model, data.image_shape)
    ranks = surgery.get_ranks(model)
    name, sizes = config["data"]["name"], data.sizes
    logs.say(f"{name}: {', '.join(f'{n} {split}' for split, n in sizes.items())}")
    logs.say(
        f"{config['model']['name']}: {cost.dense_params:,} parameters and"
        f" {cost.dense_macs:,} MACs when dense; low-rank layers {ranks}"
    )
    for phase in phases:
        logs.say(f"phase {phase.name}: steps {phase.start} to {phase.end}")
    if saved:
        logs.say(f"resuming at step {saved.step}")


def _compile(
    phase: phases_lib.Phase,
    structure: state_lib.Structure,
    prepare: Callable[..., Any],
    root_key: jax.Array,
) -> tuple[steps.Step, Callable[..., Any]]:
    """The step and the evaluation for the shapes at hand; compiled when first
    called."""
    train_step = steps.make_train_step(
        structure,
        phase.optimizer,
        phase.sampler,
        phase.penalties,
        prepare,
        root_key,
        distill=phase.distill,
        label_weight=phase.label_weight,
        passes_loss=phase.passes_loss,
    )
    evaluate = evaluation_lib.make_evaluator(
        structure, functools.partial(prepare, None)
    )
    return train_step, evaluate


def _due(every: int, epoch: int) -> bool:
    return every > 0 and epoch % every == 0


def _shrinks(phase: phases_lib.Phase, step: int, steps_per_epoch: int) -> bool:
    if phase.shrink is None:
        return False
    return step % (phase.shrink["every_epochs"] * steps_per_epoch) == 0


def _shrink(
    phase: phases_lib.Phase, structure: state_lib.Structure, state: state_lib.TrainState
) -> tuple[state_lib.Structure, state_lib.TrainState] | None:
    """The state cut by the phase's rule, or None where no rank falls."""
    model = state_lib.join_model(structure, state.params, state.model_state)
    old = surgery.get_ranks(model)
    new = shrinking.tail_ranks(
        model,
        threshold=phase.shrink["threshold"],
        multiple=phase.shrink["multiple"],
    )
    if new == old:
        return None
    shrunk = shrinking.shrink(model, new, state.opt_state, phase.optimizer)
    for path in old:
        if old[path] != new[path]:
            logs.say(f"shrink {path}: rank {old[path]} -> {new[path]}")
    for part in shrunk.restarted:
        logs.say(f"shrink: the optimizer's {part} starts anew")
    structure, params, model_state = state_lib.split_model(shrunk.model)
    return structure, state_lib.TrainState(
        state.step, params, model_state, shrunk.opt_state, phase.sampler.init(new)
    )


def _frontier(
    config: Mapping[str, Any],
    data: input_pipeline.Dataset,
    evaluate: Callable[..., dict[str, float]],
    model: nnx.Module,
    state: state_lib.TrainState,
) -> list[evaluation_lib.Figures]:
    """Figures on the validation split at the config's fractions; none without a
    split."""
    if not data.sizes["validation"]:
        return []
    return evaluation_lib.sweep(
        evaluate,
        state.params,
        state.model_state,
        surgery.get_ranks(model),
        config["eval_fractions"],
        lambda: data.eval_batches("validation", config["data"]["eval_batch_size"]),
        state_lib.model_cost(model, data.image_shape),
    )


def _by_fraction(frontier: list[evaluation_lib.Figures]) -> dict[str, Any]:
    keys = ("accuracy", "loss", "params", "macs")
    return {str(row["rank_fraction"]): {k: row[k] for k in keys} for row in frontier}


def _summary(frontier: list[evaluation_lib.Figures]) -> str:
    parts = [f"{row['accuracy']:.4f} at {row['rank_fraction']:g}" for row in frontier]
    return "validation " + ", ".join(parts) if parts else ""


def _metadata(
    config: Mapping[str, Any], data: input_pipeline.Dataset
) -> dict[str, Any]:
    shape = {"image_shape": list(data.image_shape), "num_classes": data.num_classes}
    return {"config": dict(config), "inputs": shape}


def _items(state: state_lib.TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "sampler": state.sampler_state}


def _restore(
    saved: checkpoint.Saved, state: state_lib.TrainState
) -> state_lib.TrainState:
    """The state with the optimizer's and sampler's part from the checkpoint."""
    restored = checkpoint.restore(saved, _items(state))
    return state._replace(
        opt_state=restored["opt_state"], sampler_state=restored["sampler"]
    )


class _StopRequest:
    """Notes SIGTERM, so that the loop can save before it stops."""

    requested = False

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)
