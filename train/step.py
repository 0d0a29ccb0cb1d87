"""The training step: sample ranks, one or more passes, penalties, update; one jit."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from lowrank_jax import active, paths, penalties, projections
from lowrank_jax.samplers import RankSampler, SampledRanks
from train.phases import Running
from train.state import Structure, TrainState, model_state_of
from train.tasks.base import Task

Batch = Mapping[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    structure: Structure,
    running: Running,
    task: Task,
    root_key: PRNGKeyArray,
    *,
    epoch: int = 0,
) -> Step:
    """Makes the jitted step of a phase.

    Loss of the first pass: the task's. Of each further one: the same, or with a teacher
    `target_weight` times that plus `1 - target_weight` times the task's `distill`
    towards the teacher. The first pass is the full model whenever there are several; it
    alone updates BatchNorm, the others use their own batch statistics.

    Args:
      structure: The model's structure.
      running: The phase.
      task: What is learned.
      root_key: Everything random in step n comes from `fold_in(root_key, n)`.
      epoch: Of the phase: its pattern says what is trained. The other parameters get no
        gradient and no update; their moments go on as after a zero gradient.
    """
    phase = running.phase
    pattern = phase.trainable[epoch % len(phase.trainable)]
    stateful = [penalties.stateful(penalty) for penalty in running.penalties]
    projectors = [projections.stateful(p) for _, p in phase.projections]

    def freeze(tree: Any, frozen: Callable[[Array], Array]) -> Any:
        def only_trained(key_path: Any, leaf: Array) -> Array:
            key = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return leaf if pattern.fullmatch(key) else frozen(leaf)

        if pattern.pattern == ".*":
            return tree
        return jax.tree.map_with_path(only_trained, tree)

    def project(params: Any, state: TrainState) -> tuple[Any, Any]:
        if not projectors:
            return params, state.projections
        model = structure.merge(params, state.model_state, root_key)
        states = tuple(
            projector.apply(model, own_state, state.step - running.start)
            for projector, own_state in zip(projectors, state.projections, strict=True)
        )
        return nnx.as_pure(nnx.state(model, nnx.Param)), states

    def penalize(model: nnx.Module, state: TrainState) -> tuple[Array, Any]:
        total, states = jnp.float32(0), []
        for penalty, own_state in zip(stateful, state.penalties, strict=True):
            value, own_state = penalty.apply(
                model, own_state, state.step - running.start
            )
            total += value
            states.append(jax.lax.stop_gradient(own_state))
        return total, tuple(states)

    def loss_of(params: Any, state: TrainState, batch: Batch, passes: Any, key: Any):
        params = freeze(params, jax.lax.stop_gradient)
        input_key, model_key = jax.random.split(key)
        inputs = task.inputs(batch, input_key)
        losses, first_outputs, taught, new_state = [], None, None, None
        for ranks in passes:
            model = structure.merge(params, state.model_state, model_key)
            active.set_ranks(model, ranks)
            outputs = model(*inputs)
            loss = task.loss(outputs, batch)
            if not losses:  # the first pass: it learns from the targets alone
                first_outputs, new_state = outputs, model_state_of(model)
                if phase.teacher is not None:
                    taught = phase.teacher.outputs(outputs, inputs)
            elif phase.teacher is not None:
                share = phase.teacher.target_weight
                soft = task.distill(outputs, taught, batch)
                loss = share * loss + (1 - share) * soft
            losses.append(loss)
        others = losses[1:]
        share = 1 / len(others) if others and phase.passes_loss == "mean" else 1
        total = losses[0] + share * sum(others)
        penalty, penalty_states = penalize(model, state)
        metrics = {"loss": total, "penalty": penalty}
        metrics |= _means(task.sums(first_outputs, batch))
        metrics |= {f"loss_pass_{n}": loss for n, loss in enumerate(losses)}
        return total + penalty, (new_state, penalty_states, metrics)

    def decayed_params(params: Any, state: TrainState, passes: Any) -> Any:
        """The parameters as the optimizer's decay shall see them."""
        if phase.optimizer.decays_masked:
            return params
        model = structure.merge(params, state.model_state, root_key)
        for path, factors in paths.find_factors(model).items():
            ranks = [ranks[path] for ranks in passes if path in ranks]
            if len(ranks) == len(passes):  # else one pass runs at the active rank
                factors.set_rank(jnp.stack(ranks).max(axis=0))
            factors.zero_masked()
        return nnx.as_pure(nnx.state(model, nnx.Param))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        rank_key, key = jax.random.split(jax.random.fold_in(root_key, state.step))
        ranks, sampler_state = phase.sampler.sample(
            state.sampler_state, rank_key, state.step - running.start
        )
        passes = _passes(ranks, phase.sampler)
        if phase.teacher and phase.teacher.full_pass and not phase.sampler.full_first:
            passes.insert(0, {})  # the structure's own ranks, all that is allocated
        grads, (model_state, penalty_states, metrics) = jax.grad(loss_of, has_aux=True)(
            state.params, state, batch, passes, key
        )
        updates, opt_state = running.optimizer.update(
            grads, state.opt_state, decayed_params(state.params, state, passes)
        )
        updates = freeze(updates, jnp.zeros_like)
        params, projection_states = project(
            optax.apply_updates(state.params, updates), state
        )
        metrics["gradient_norm"] = optax.tree.norm(grads)
        new = TrainState(
            state.step + 1,
            params,
            model_state,
            opt_state,
            sampler_state,
            penalty_states,
            projection_states,
        )
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def _passes(ranks: SampledRanks, sampler: RankSampler) -> list[SampledRanks]:
    if sampler.passes == 1:
        return [ranks]
    return [
        {path: rank[n] for path, rank in ranks.items()} for n in range(sampler.passes)
    ]


def _means(sums: Mapping[str, Array]) -> dict[str, Array]:
    """What the task sums up, but for the loss, divided by its weight."""
    return {
        name: value / sums["weight"]
        for name, value in sums.items()
        if name not in ("weight", "loss")
    }
