"""The state that training carries from step to step, and the structure that stays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from lowrank_jax import active, penalties, projections, samplers
from lowrank_jax.factors import Rank
from lowrank_jax.ranks import Limits
from train.phases import Running


class TrainState(NamedTuple):
    """All that changes in training; pure arrays, donated from step to step.

    Args:
      step: Of the run.
      params: What gradients move.
      model_state: What else the model holds, such as BatchNorm's statistics.
      opt_state: Of the phase's optimizer.
      sampler_state: Of its sampler.
      penalties: The state of each of its penalties, empty for one without.
      projections: The state of each of its projections.
    """

    step: Int[Array, ""]
    params: Any
    model_state: Any
    opt_state: optax.OptState
    sampler_state: Any
    penalties: tuple[Any, ...]
    projections: tuple[Any, ...]

    def items(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the model."""
        return {
            "opt_state": self.opt_state,
            "sampler": self.sampler_state,
            "penalties": self.penalties,
            "projections": self.projections,
        }

    def with_items(self, items: dict[str, Any]) -> "TrainState":
        """Returns the state with what a checkpoint held."""
        return self._replace(
            opt_state=items["opt_state"],
            sampler_state=items["sampler"],
            penalties=items["penalties"],
            projections=items["projections"],
        )


class Structure(NamedTuple):
    """What stays: how to make a model, for training or evaluation, out of a state.

    Args:
      train: The graph in training mode.
      evaluation: The graph in evaluation mode.
      ranks: The active ranks.
      rngs: The shapes of the random streams.
      limits: What bounds the ranks of each layer.
    """

    train: nnx.GraphDef
    evaluation: nnx.GraphDef
    ranks: Any
    rngs: Any
    limits: dict[str, Limits]

    def merge(
        self, params: Any, model_state: Any, key: PRNGKeyArray | None
    ) -> nnx.Module:
        """Makes a model for one trace: in training mode with a key, else not."""
        graphdef = self.evaluation if key is None else self.train
        rngs = seed_rngs(self.rngs, jax.random.key(0) if key is None else key)
        parts = (params, model_state, self.ranks, rngs)
        return nnx.merge(graphdef, *parts, copy=True)


def split_model(model: nnx.Module) -> tuple[Structure, Any, Any]:
    """Returns a model as its structure, parameters and other state (pure arrays)."""
    model = nnx.clone(model)
    model.eval()
    evaluation = nnx.graphdef(model)
    model.train()
    train, params, ranks, rngs, rest = nnx.split(
        model, nnx.Param, Rank, nnx.RngState, ...
    )
    pure = (nnx.as_pure(part) for part in (params, ranks, rngs, rest))
    params, ranks, rngs, rest = pure
    structure = Structure(train, evaluation, ranks, rngs, active.rank_limits(model))
    return structure, params, rest


def model_state_of(model: nnx.Module) -> Any:
    """Returns the arrays that no gradient moves, such as BatchNorm's statistics."""
    return nnx.as_pure(nnx.split(model, nnx.Param, Rank, nnx.RngState, ...)[-1])


def new_state(
    model: nnx.Module, running: Running, step: int
) -> tuple[Structure, TrainState]:
    """Makes a state for a phase that begins (or continues, to be filled) at this step.

    It shares the model's arrays: the first step, which donates its state, ends them.
    """
    structure, params, model_state = split_model(model)
    sampler_state = running.phase.sampler.init(active.get_ranks(model))
    parts = (params, model_state, sampler_state)
    return structure, fill_state(structure, *parts, running, step)


def fill_state(
    structure: Structure,
    params: Any,
    model_state: Any,
    sampler_state: Any,
    running: Running,
    step: int,
) -> TrainState:
    """Makes a state of a model in parts; runs on abstract arrays.

    Args:
      structure: Of the model.
      params: Its parameters.
      model_state: Its other arrays.
      sampler_state: The sampler's, which is made of plain ranks.
      running: The phase.
      step: Of the run.
    """
    phase = running.phase
    model = structure.merge(params, model_state, None)
    return TrainState(
        jnp.int32(step),
        params,
        model_state,
        running.optimizer.init(params),
        sampler_state,
        tuple(penalties.stateful(p).init(model) for p in running.penalties),
        tuple(projections.stateful(p).init(model) for _, p in phase.projections),
    )


def carried_state(
    model: nnx.Module, running: Running, old: TrainState
) -> tuple[Structure, TrainState]:
    """Makes a state for a model that was cut in the middle of a phase.

    Sampler, penalties and projections keep what they can; the optimizer's is fresh.
    """
    structure, fresh = new_state(model, running, int(old.step))
    phase = running.phase
    return structure, fresh._replace(
        sampler_state=samplers.carry(phase.sampler, old.sampler_state, model),
        penalties=tuple(
            penalties.carry(penalties.stateful(penalty), state, model)
            for penalty, state in zip(running.penalties, old.penalties, strict=True)
        ),
        projections=tuple(
            projections.carry(projections.stateful(projection), state, model)
            for (_, projection), state in zip(
                phase.projections, old.projections, strict=True
            )
        ),
    )


def seed_rngs(rngs: Any, key: PRNGKeyArray) -> Any:
    """Starts every random stream of a model anew from one key."""
    leaves, treedef = jax.tree.flatten(rngs)

    def seeded(index: int, leaf: Any) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)  # a counter
        stream = jax.random.fold_in(key, index)
        return stream if leaf.shape == () else jax.random.split(stream, leaf.shape)

    return treedef.unflatten([seeded(n, leaf) for n, leaf in enumerate(leaves)])
