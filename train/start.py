"""What a run starts from: its parts, checked before any work, and its model."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
from flax import nnx

from lowrank_jax import active, checkpoint, errors, paths
from lowrank_jax.errors import UserError
from lowrank_jax.version import __version__
from train import checks, distributed, folders, phases
from train.config import differences, to_json
from train.model import about, factorize, load_model
from train.report import logs
from train.run import Run, open_run
from train.stopping import StopRequest


class Start(NamedTuple):
    """What the loop begins with.

    Args:
      run: What the run is about.
      plan: Its phases.
      model: The model to start or go on with.
      saved: The checkpoint to go on from, if there is one.
    """

    run: Run
    plan: tuple[phases.Phase, ...]
    model: nnx.Module
    saved: checkpoint.Saved | None


def start_run(config: Any, workdir: Path, stop: StopRequest) -> Start:
    """Opens a run; the workdir is made, and says what config it is of.

    Every process checks for itself; where one fails, all do.

    Args:
      config: A `ConfigDict` or mapping as in `configs/`.
      workdir: Folder of the run; a new one, or one that holds a run of the same config.
      stop: What asks the run to stop.

    Raises:
      UserError: Something does not hold together; nothing was written.
    """

    def check() -> tuple[Run, tuple[phases.Phase, ...], checkpoint.Saved | None]:
        complete = to_json(config)
        plan = phases.build_phases(complete["phases"])
        run = open_run(complete, stop=stop)
        return run, plan, check_workdir(workdir, run.config)

    run, plan, saved = distributed.together(check)
    distributed.check_same(
        {
            "config": run.config,
            "versions": versions(),
            "checkpoint": saved and saved.step,
        }
    )
    if saved is None:
        model = _initial_model(run)
        distributed.together(lambda: checks.check_phases(run, plan, model))
    else:
        model = run.placement.put_model(load_model(saved, allow_imports=None))
    _describe(run, plan, model, saved)
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run.config, indent=1, sort_keys=True)
        folders.write_atomically(workdir / "config.json", text)
    return Start(run, plan, model, saved)


def own(workdir: Path, resources: contextlib.ExitStack) -> None:
    """Owns a workdir until the resources are given back; of several processes, the
    first does.

    Raises:
      UserError: Another run has it, or it cannot be written.
    """
    if distributed.is_first():
        with errors.at("--workdir"):
            folders.check_writable(workdir)
            resources.enter_context(folders.lock(workdir))
        folders.put_back(workdir / "checkpoints")


def versions() -> dict[str, str]:
    """Returns the versions that the processes of a run must share."""
    return {
        "lowrank_jax": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> checkpoint.Saved | None:
    """Returns the latest checkpoint of this config's run, if there is one.

    Raises:
      UserError: It holds something else.
    """
    file = workdir / "config.json"
    if not file.exists():
        if not all(folders.is_leftover(path) for path in workdir.glob("*")):
            raise UserError(
                f"--workdir: must be a new folder or one of a run, got {workdir}, which"
                " holds other files. Nothing is overwritten; name another."
            )
        return None
    folder = workdir / "checkpoints"
    begun = any(path.name.isdigit() for path in folder.glob("*"))
    try:
        with errors.at("--workdir"):
            lines = differences(file, config)
    except UserError:
        if begun:
            raise
        return None  # cut off by a kill, when there was nothing to lose yet
    if lines:
        raise UserError(
            f"--workdir: must hold a run of the same config, got {workdir} with\n  "
            + "\n  ".join(lines)
            + "\nName a new workdir; config.init_from starts from a checkpoint."
        )
    if not begun:
        return None
    with errors.at("--workdir"):
        return checkpoint.open_checkpoint(folder)


def _initial_model(run: Run) -> nnx.Module:
    """The model to start from: `init_from`'s, or a new one."""
    if not run.config["init_from"]:
        return run.fresh_model()
    with errors.at("config.init_from"):
        saved = checkpoint.open_checkpoint(run.config["init_from"])
        their_config, facts, _ = about(saved)
        theirs = run.complete_model(their_config["model"])
        if (theirs, facts) != (run.config["model"], run.data.facts):
            raise UserError(
                f"must be a checkpoint of the same model and data, got {theirs} for"
                f" {facts}, here {run.config['model']} for {run.data.facts}. Correct"
                " config.model or the path."
            )
        model = load_model(saved, allow_imports=None)
    model = factorize(model, run.config)
    _check_same_layers(run, model)
    return run.placement.put_model(model)


def _check_same_layers(run: Run, model: nnx.Module) -> None:
    """Low-rank layers of `init_from` must be low-rank by the rules as well."""
    wanted = nnx.eval_shape(run.build_model)
    extra = sorted({*paths.find_factors(model)} - {*paths.find_factors(wanted)})
    if extra:
        raise UserError(
            "config.rank_rules: layers that are low-rank in config.init_from must be so"
            f" here, got 'dense' for {extra}. Change their rule to 'full'; their ranks"
            " are those of the checkpoint."
        )


def _describe(
    run: Run,
    plan: Sequence[phases.Phase],
    model: nnx.Module,
    saved: checkpoint.Saved | None,
) -> None:
    cost = run.cost(model)
    sizes = ", ".join(f"{n} {split}" for split, n in run.data.sizes.items())
    logs.say(f"{run.config['data']['name']}: {sizes}")
    logs.say(
        f"{run.config['model']['name']}: {cost.dense_params:,} parameters and"
        f" {cost.dense_macs:,} MACs when dense; low-rank layers"
        f" {active.get_ranks(model)}"
    )
    spans = phases.spans(plan, run.steps_per_epoch)
    for phase, (start, end) in zip(plan, spans, strict=True):
        most = "at most " if phase.until.condition else ""
        logs.say(f"phase {phase.name}: steps {start} to {most}{end}")
    if saved:
        logs.say(f"resuming at step {saved.step}")
