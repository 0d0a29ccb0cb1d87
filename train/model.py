"""The model of a config, of a checkpoint, and what it costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_jax import checkpoint, counting, errors, factorization, families
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.ranks import Limits, Ranks, largest
from train import recorded, registry, schema
from train.models import MODELS
from train.sharding import Placement
from train.state import seed_rngs
from train.tasks import TASKS, Task, check_parts


def build_task(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    allow_imports: Sequence[str] | None,
) -> Task:
    """Builds the config's task for data with these facts.

    Args:
      config: The whole config as plain values.
      facts: What the data source knows, as JSON values.
      allow_imports: Packages that names may import from, None for all.
    """
    with errors.at("config.task"):
        spec = config["task"]
        task = registry.build(spec, TASKS, facts, allow_imports=allow_imports)
        registry.check_kind(spec, TASKS, task, lambda made: isinstance(made, Task))
        check_parts(task)
        return task


def build_model(
    config: Mapping[str, Any], task: Task, *, allow_imports: Sequence[str] | None
) -> nnx.Module:
    """Builds the config's model, factorized by its rules, from the config's seed.

    Args:
      config: The whole config as plain values.
      task: What the model is for.
      allow_imports: Packages that names may import from, None for all.
    """
    return factorize(_dense_model(config, task, allow_imports), config)


def factorize(model: nnx.Module, config: Mapping[str, Any]) -> nnx.Module:
    """Returns the model with its dense layers made low-rank by the config's rules."""
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(config["seed"]), 1))
    with errors.at("config.rank_rules"):
        rules = schema.pairs(config["rank_rules"])
        return factorization.factorize(model, rules, rngs=rngs)


def load_model(
    saved: checkpoint.Saved,
    *,
    ranks: Ranks | None = None,
    allow_imports: Sequence[str] | None,
    placement: Placement | None = None,
) -> nnx.Module:
    """Loads the model of a checkpoint of this application, at its ranks or lower ones.

    The checkpoint says itself what model it is of. On a mesh every device reads what it
    holds, whatever mesh the checkpoint was written on.
    """
    model = abstract_checkpoint_model(saved, allow_imports=allow_imports)
    if placement is not None:
        model = placement.template(model)
    return checkpoint.load(saved, model, ranks=ranks)


def checkpoint_task(
    saved: checkpoint.Saved, *, allow_imports: Sequence[str] | None
) -> Task:
    """Builds the task that a checkpoint's model was trained for."""
    config, facts, _ = about(saved)
    return build_task(config, facts, allow_imports=allow_imports)


def abstract_checkpoint_model(
    saved: checkpoint.Saved, *, allow_imports: Sequence[str] | None
) -> nnx.Module:
    """Builds the structure of a checkpoint's model, made low-rank as it is."""
    config, facts, rules = about(saved)
    task = build_task(config, facts, allow_imports=allow_imports)

    def build() -> nnx.Module:
        model = _dense_model(config, task, allow_imports)
        with errors.at(f"checkpoint {saved.path}: rank_rules"):
            return factorization.factorize(model, rules)

    return abstract_model(build)


def abstract_model(build: Callable[[], nnx.Module]) -> nnx.Module:
    """Builds a model without its arrays; random keys are real, unused ones."""
    model = nnx.eval_shape(build)
    graphdef, rngs, rest = nnx.split(model, nnx.RngState, ...)
    return nnx.merge(graphdef, seed_rngs(nnx.as_pure(rngs), jax.random.key(0)), rest)


def model_cost(model: nnx.Module, task: Task) -> counting.ModelCost:
    """Counts the parameters of a model, and its MACs for one unit of a task."""
    return counting.count(model, *task.example)


def example_inputs(
    task: Task, facts: Mapping[str, Any]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the model's inputs for one whole example, however many units it has.

    Args:
      task: What the model is for.
      facts: What its data source knows, with the arrays of an example.
    """
    batch = {
        name: jax.ShapeDtypeStruct((1, *array["shape"]), array["dtype"])
        for name, array in facts["arrays"].items()
    }
    return jax.eval_shape(lambda batch: task.inputs(batch, None), batch)


def about(saved: checkpoint.Saved) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """Returns a checkpoint's config, the facts of its data, its structure's rules.

    Raises:
      UserError: It was written by something else.
    """
    with errors.at(f"checkpoint {saved.path}"):
        return recorded.read(saved.metadata)


def family_of(saved: checkpoint.Saved) -> Family:
    """Returns the family of a checkpoint, empty where it has none (`recorded.family`).

    Raises:
      UserError: It does not fit the checkpoint's layers.
    """
    family = recorded.family(saved.metadata)
    limits = {
        path: Limits(rank, largest(rank))
        for path, rank in saved.metadata["ranks"].items()
    }
    lowered = [(x, families.lowered(ranks, limits)) for x, ranks in family]
    with errors.at(f"checkpoint {saved.path}"):
        families.check(lowered, limits)
    return lowered


def check_facts(saved: checkpoint.Saved, facts: Mapping[str, Any]) -> None:
    """Raises UserError where data are not those that a checkpoint was trained on, as
    with another tokenizer."""
    _, theirs, _ = about(saved)
    if differences := schema.difference(theirs, facts, "facts"):
        raise UserError(
            f"checkpoint {saved.path}: must be used with the data that it was trained"
            f" on, got others: {'; '.join(differences)}. Give it those, by --data_dir"
            " or the config's data."
        )


def _dense_model(
    config: Mapping[str, Any], task: Task, allow_imports: Sequence[str] | None
) -> nnx.Module:
    spec = config["model"]
    with errors.at("config.model"):
        try:
            model = registry.build(
                spec,
                MODELS,
                allow_imports=allow_imports,
                rngs=nnx.Rngs(config["seed"]),
                **task.model_args,
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"must fit into the memory, got {spec['name']} with {spec['args']}"
                f" ({str(error).splitlines()[0]}). Lower its sizes."
            ) from error
        registry.check_kind(spec, MODELS, model, lambda m: isinstance(m, nnx.Module))
        return model
