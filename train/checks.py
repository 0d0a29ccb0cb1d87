"""What must hold before the first step: the folder, the start, every phase."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from train import actions
from train.config import difference
from train.data import pipeline
from train.phases import Phase
from train.state import abstract_model, build_model, model_cost


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> checkpoint.Saved | None:
    """The latest checkpoint of this config's run in the workdir, if there is one."""
    file = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: must be a folder, got {workdir}. Name another.")
    if not file.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(
                f"--workdir: must be a new folder or one of a run, got {workdir}, which"
                " holds other files. Nothing is overwritten; name another."
            )
        return None
    lines = difference(json.loads(file.read_text()), config)
    if lines:
        raise UserError(
            f"--workdir: must hold a run of the same config, got {workdir} with\n  "
            + "\n  ".join(lines)
            + "\nName a new workdir; config.init_from starts from a checkpoint."
        )
    folder = workdir / "checkpoints"
    if not folder.is_dir() or not any(p.name.isdigit() for p in folder.iterdir()):
        return None
    return checkpoint.open_checkpoint(folder, flag="--workdir")


def check_phases(
    phases: list[Phase],
    model: nnx.Module,
    config: Mapping[str, Any],
    data: pipeline.Dataset,
) -> None:
    """Traces every phase on the model it will have, without any work.

    Samplers and penalties run on abstract factors; the actions at a phase's end are
    previewed, so that the next phase is checked on the structure they leave.

    Args:
      phases: All phases.
      model: The model of the first one.
      config: The whole config.
      data: The data set.

    Raises:
      ValueError: Naming the phase.
    """
    model = nnx.eval_shape(nnx.clone, model)
    held_out = data.sizes["validation"] > 0
    cost = functools.partial(model_cost, image_shape=data.image_shape)
    scorer = (lambda model: lambda ranks: [0.0] * len(ranks)) if held_out else None
    context = actions.Context(cost, scorer, None, None, None, preview=True)
    for phase, spec in zip(phases, config["phases"], strict=True):
        where = f"config.phases ({phase.name})"
        try:
            _check_phase(phase, spec, model, config["data"]["batch_size"])
            for name, action in phase.on_end:
                where = f"config.phases ({phase.name}).on_end ({name})"
                change = action(model, context)
                model = change.model
                if change.target_ranks is not None:
                    context = context._replace(target_ranks=change.target_ranks)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


def _check_phase(
    phase: Phase,
    spec: Mapping[str, Any],
    model: nnx.Module,
    batch_size: int,
) -> None:
    ranks = max_ranks(model)
    if not ranks:
        _check_dense(spec)
    params = checkpoint.flatten(checkpoint.model_items(model)["params"])
    _check_patterns(spec, list(params))
    sampler_state = phase.sampler.init(ranks)
    sampled, _ = jax.eval_shape(phase.sampler.sample, sampler_state, jax.random.key(0))
    if phase.sampler.per_example:
        _check_examples(sampled, batch_size)
    jax.eval_shape(functools.partial(_apply, phase), model, sampled)


def _check_dense(spec: Mapping[str, Any]) -> None:
    """What acts on factors has nothing to act on in a dense model."""
    idle = [key for key in ("penalties", "projections", "shrink") if spec[key]]
    if spec["sampler"]["name"] != "full":
        idle.append("sampler")
    if idle:
        raise UserError(
            f"{', '.join(idle)}: need low-rank layers, got a dense model. Use the"
            " sampler 'full' and nothing else, or make layers low-rank in"
            " config.rank_rules."
        )


def _check_patterns(spec: Mapping[str, Any], keys: list[str]) -> None:
    """Patterns for parameters must match one, where they are used."""
    patterns = {f"trainable {text!r}": text for text in spec["trainable"]}
    if spec["optimizer"]["weight_decay"]:
        patterns["optimizer.decayed"] = spec["optimizer"]["decayed"]
    for where, text in patterns.items():
        if not any(re.fullmatch(text, key) for key in keys):
            raise UserError(
                f"{where}: must match a parameter, got {text!r} among {sorted(keys)}."
                " Patterns must match the whole path."
            )
    if spec["projections"] and list(spec["trainable"]) != [".*"]:
        raise UserError(
            "trainable: must be ('.*',) beside projections, which move both factors,"
            f" got {spec['trainable']}. Drop one of the two."
        )


def _check_examples(sampled: Mapping[str, Any], batch_size: int) -> None:
    """One rank per example needs as many as the batch has."""
    sizes = {rank.shape[-1] for rank in sampled.values()}
    if sizes - {batch_size}:
        raise UserError(
            "per_example's batch_size must be config.data.batch_size"
            f" {batch_size}, got {sizes}. Make them equal."
        )


def _apply(phase: Phase, model: nnx.Module, sampled: Any) -> Any:
    """What a step does with the factors, for tracing."""
    for number in range(phase.sampler.passes):
        one_pass = sampled
        if phase.sampler.passes > 1:
            one_pass = {path: rank[number] for path, rank in sampled.items()}
        set_ranks(model, one_pass)
    factors = find_factors(model)
    penalties = [penalty(factors, 0) for penalty in phase.penalties]
    for projection in phase.projections:
        projection(factors, 0)
    return penalties


def check_same_layers(
    model: nnx.Module, config: Mapping[str, Any], data: pipeline.Dataset
) -> None:
    """Low-rank layers of `init_from` must be low-rank by the rules as well."""
    wanted = abstract_model(
        lambda: build_model(
            config, data.image_shape, data.num_classes, allow_imports=None
        )
    )
    extra = sorted({*find_factors(model)} - {*find_factors(wanted)})
    if extra:
        raise UserError(
            "config.rank_rules: layers that are low-rank in config.init_from must be so"
            f" here, got 'dense' for {extra}. Change their rule to 'full'; their ranks"
            " are those of the checkpoint."
        )
