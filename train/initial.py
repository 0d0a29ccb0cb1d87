"""The model that a run starts with: a new one, or a checkpoint's."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from lowrank_jax import errors, paths
from lowrank_jax.errors import UserError
from train.model import about, factorize
from train.opening import load_latest
from train.report import logs
from train.run import Run
from train.schema import difference


def initial_model(run: Run) -> nnx.Module:
    """Returns the model to start from, on the mesh: `init_from`'s, or a new one.

    Raises:
      UserError: The checkpoint is of something else.
    """
    if not run.config["init_from"]:
        with logs.stage("building the model"):
            return run.fresh_model()
    with errors.at("config.init_from"):
        saved, model = load_latest(
            run.config["init_from"], allow_imports=None, placement=run.placement
        )
        their_config, facts, _ = about(saved)
        theirs = {
            "task": their_config["task"]["name"],
            "facts": _of_model(facts),
            "model": run.complete_model(their_config["model"]),
        }
        ours = {
            "task": run.config["task"]["name"],
            "facts": _of_model(run.data.facts),
            "model": run.config["model"],
        }
        if differences := difference(theirs, ours, "it"):
            raise UserError(
                "must be a checkpoint of the same task, data and model, got"
                f" {'; '.join(differences)}. Correct config or the path."
            )
    model = factorize(model, run.config)
    _check_same_layers(run, model)
    return run.placement.put_model(model)


def _of_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without what tells a data set from others of its kind."""
    return {name: fact for name, fact in facts.items() if name != "about"}


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
