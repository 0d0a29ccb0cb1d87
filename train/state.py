"""The model of a config, and the state that training carries from step to step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from lowrank_jax import checkpoint, counting, errors, factorization
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Rank
from lowrank_jax.ranks import Ranks
from lowrank_jax.samplers import RankSampler
from train import registry
from train.config import pairs
from train.models import MODELS


class TrainState(NamedTuple):
    """All that changes in training; pure arrays, donated from step to step."""

    step: Int[Array, ""]
    params: Any
    model_state: Any
    opt_state: optax.OptState
    sampler_state: Any


class Structure(NamedTuple):
    """What stays: how to make a model, for training or evaluation, out of a state."""

    train: nnx.GraphDef
    evaluation: nnx.GraphDef
    ranks: Any
    rngs: Any

    def merge(
        self, params: Any, model_state: Any, key: PRNGKeyArray | None
    ) -> nnx.Module:
        """A model of its own for one trace: in training mode with a key, else not."""
        graphdef = self.evaluation if key is None else self.train
        rngs = seed_rngs(self.rngs, jax.random.key(0) if key is None else key)
        parts = (params, model_state, self.ranks, rngs)
        return nnx.merge(graphdef, *parts, copy=True)


def build_model(
    config: Mapping[str, Any],
    image_shape: Sequence[int],
    num_classes: int,
    *,
    allow_imports: Sequence[str] | None,
) -> nnx.Module:
    """The config's model, factorized by its rules, from the config's seed.

    Args:
      config: The whole config as plain values.
      image_shape: Shape (x, y, c) of an image.
      num_classes: Number of classes.
      allow_imports: Packages that names may import from, None for all.
    """
    model = _dense_model(config, image_shape, num_classes, allow_imports=allow_imports)
    return factorize(model, config)


def factorize(model: nnx.Module, config: Mapping[str, Any]) -> nnx.Module:
    """The model with its dense layers made low-rank by the config's rules."""
    rules = pairs(config["rank_rules"], "config.rank_rules")
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(config["seed"]), 1))
    return factorization.factorize(model, rules, rngs=rngs, where="config.rank_rules")


def _dense_model(
    config: Mapping[str, Any],
    image_shape: Sequence[int],
    num_classes: int,
    *,
    allow_imports: Sequence[str] | None,
) -> nnx.Module:
    with errors.at("config.model"):
        return registry.build(
            config["model"],
            MODELS,
            allow_imports=allow_imports,
            image_shape=tuple(image_shape),
            num_classes=num_classes,
            rngs=nnx.Rngs(config["seed"]),
        )


def load_model(
    saved: checkpoint.Saved,
    *,
    ranks: Ranks | None = None,
    allow_imports: Sequence[str] | None,
) -> nnx.Module:
    """The model of a checkpoint of this application, at its ranks or lower ones.

    The checkpoint says itself what model it is of.
    """
    model = abstract_checkpoint_model(saved, allow_imports=allow_imports)
    return checkpoint.load(saved, model, ranks=ranks)


def abstract_checkpoint_model(
    saved: checkpoint.Saved, *, allow_imports: Sequence[str] | None
) -> nnx.Module:
    """The structure of a checkpoint's model: the config's, made low-rank as it is."""
    try:
        config, inputs = saved.metadata["config"], saved.metadata["inputs"]
        shape, classes = inputs["image_shape"], inputs["num_classes"]
        rules = [tuple(pair) for pair in saved.metadata["rank_rules"]]
    except KeyError as error:
        raise UserError(
            f"checkpoint {saved.path}: metadata must hold config, inputs and"
            f" rank_rules, got no {error}. It was not written by train.main or"
            " train.truncate."
        ) from error

    def build() -> nnx.Module:
        model = _dense_model(config, shape, classes, allow_imports=allow_imports)
        where = f"checkpoint {saved.path}: rank_rules"
        return factorization.factorize(model, rules, where=where)

    return abstract_model(build)


def abstract_model(build: Callable[[], nnx.Module]) -> nnx.Module:
    """The model's structure without its arrays; random keys are real, unused ones."""
    model = nnx.eval_shape(build)
    graphdef, rngs, rest = nnx.split(model, nnx.RngState, ...)
    return nnx.merge(graphdef, seed_rngs(nnx.as_pure(rngs), jax.random.key(0)), rest)


def split_model(model: nnx.Module) -> tuple[Structure, Any, Any]:
    """A model as its structure, parameters and other state (pure arrays)."""
    model = nnx.clone(model)
    model.eval()
    evaluation = nnx.graphdef(model)
    model.train()
    train, params, ranks, rngs, rest = nnx.split(
        model, nnx.Param, Rank, nnx.RngState, ...
    )
    pure = (nnx.as_pure(part) for part in (params, ranks, rngs, rest))
    params, ranks, rngs, rest = pure
    return Structure(train, evaluation, ranks, rngs), params, rest


def model_state_of(model: nnx.Module) -> Any:
    """The arrays of a model that no gradient moves, such as BatchNorm's statistics."""
    return nnx.as_pure(nnx.split(model, nnx.Param, Rank, nnx.RngState, ...)[-1])


def join_model(structure: Structure, params: Any, model_state: Any) -> nnx.Module:
    """The model of a state, in evaluation mode, at its full ranks."""
    return structure.merge(params, model_state, None)


def new_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    sampler: RankSampler,
    step: int,
) -> tuple[Structure, TrainState]:
    """A state for a phase that begins (or continues, to be filled) at this step.

    It shares the model's arrays: the first step, which donates its state, ends them.
    """
    structure, params, model_state = split_model(model)
    state = TrainState(
        jnp.int32(step),
        params,
        model_state,
        optimizer.init(params),
        sampler.init(get_ranks(model)),
    )
    return structure, state


def seed_rngs(rngs: Any, key: PRNGKeyArray) -> Any:
    """Every random stream of a model started anew from one key."""
    leaves, treedef = jax.tree.flatten(rngs)

    def seeded(index: int, leaf: Any) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)  # a counter
        stream = jax.random.fold_in(key, index)
        return stream if leaf.shape == () else jax.random.split(stream, leaf.shape)

    return treedef.unflatten([seeded(n, leaf) for n, leaf in enumerate(leaves)])


def model_cost(model: nnx.Module, image_shape: Sequence[int]) -> counting.ModelCost:
    """Parameters and MACs of a model for one image."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return counting.count(model, image)
