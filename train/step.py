"""The training step: sample ranks, one or more passes, penalties, update; one jit."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from lowrank_jax import active, penalties, projections
from lowrank_jax.paths import find_factors
from lowrank_jax.samplers import RankSampler, SampledRanks
from train.phases import Running
from train.state import Structure, TrainState, model_state_of
from train.tasks.base import Task

Batch = Mapping[str, Array]
Passes = Sequence[SampledRanks]
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

    Args:
      structure: The model's structure.
      running: The phase.
      task: What is learned.
      root_key: Everything random in step n comes from `fold_in(root_key, n)`.
      epoch: Of the phase: its pattern says what is trained. The other parameters get no
        gradient and no update; their moments go on as after a zero gradient.
    """
    patterns = running.phase.trainable
    pattern = patterns[epoch % len(patterns)]
    step = _TrainStep(structure, running, task, root_key, pattern)
    return jax.jit(step.apply, donate_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainStep:
    """The step as a pure function; the arguments are those of `make_train_step`."""

    structure: Structure
    running: Running
    task: Task
    root_key: PRNGKeyArray
    pattern: re.Pattern[str]

    def apply(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes one step; returns the new state and the metrics of the old one."""
        rank_key, key = jax.random.split(jax.random.fold_in(self.root_key, state.step))
        passes, sampler_state = self._sample(state, rank_key)
        grads, (model_state, penalty_states, metrics) = jax.grad(
            self._loss, has_aux=True
        )(state.params, state, batch, passes, key)
        updates, opt_state = self.running.optimizer.update(
            grads, state.opt_state, self._decaying(state, passes)
        )
        updates = self._freeze(updates, jnp.zeros_like)
        params, projection_states = self._project(
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

    def _phase_step(self, state: TrainState) -> Array:
        return state.step - self.running.start

    def _sample(self, state: TrainState, key: PRNGKeyArray) -> tuple[Passes, Any]:
        """The ranks of each pass; `{}` are the structure's own, all that is active."""
        phase = self.running.phase
        ranks, sampler_state = phase.sampler.sample(
            state.sampler_state, key, self._phase_step(state)
        )
        passes = _passes(ranks, phase.sampler)
        if phase.teacher and phase.teacher.full_pass and not phase.sampler.full_first:
            passes.insert(0, {})
        return passes, sampler_state

    def _loss(
        self,
        params: Any,
        state: TrainState,
        batch: Batch,
        passes: Passes,
        key: PRNGKeyArray,
    ) -> tuple[Array, Any]:
        """Loss of the first pass: the task's. Of each further one: the same, or with a
        teacher `target_weight` times that plus `1 - target_weight` times the task's
        `distill` towards the teacher.

        The first pass is the full model whenever there are several; it alone updates
        BatchNorm, the others use their own batch statistics.
        """
        task, phase = self.task, self.running.phase
        params = self._freeze(params, jax.lax.stop_gradient)
        input_key, model_key = jax.random.split(key)
        inputs = task.inputs(batch, input_key)
        losses, first_outputs, taught, new_state = [], None, None, None
        for ranks in passes:
            model = self.structure.merge(params, state.model_state, model_key)
            active.set_ranks(model, ranks)
            outputs = model(*inputs)
            loss = task.loss(outputs, batch)
            if not losses:
                first_outputs, new_state = outputs, model_state_of(model)
                if phase.teacher is not None:
                    taught = phase.teacher.outputs(outputs, inputs)
            elif phase.teacher is not None:
                share = phase.teacher.target_weight
                loss = share * loss + (1 - share) * task.distill(outputs, taught, batch)
            losses.append(loss)
        others = losses[1:]
        share = 1 / len(others) if others and phase.passes_loss == "mean" else 1
        total = losses[0] + share * sum(others)
        penalty, penalty_states = self._penalize(model, state)
        metrics = {"loss": total, "penalty": penalty}
        metrics |= _means(task.sums(first_outputs, batch))
        metrics |= {f"loss_pass_{n}": loss for n, loss in enumerate(losses)}
        return total + penalty, (new_state, penalty_states, metrics)

    def _penalize(self, model: nnx.Module, state: TrainState) -> tuple[Array, Any]:
        """The sum of the phase's penalties, and their new states."""
        total, states = jnp.float32(0), []
        for penalty, own_state in zip(
            self.running.penalties, state.penalties, strict=True
        ):
            value, own_state = penalties.stateful(penalty).apply(
                model, own_state, self._phase_step(state)
            )
            total += value
            states.append(jax.lax.stop_gradient(own_state))
        return total, tuple(states)

    def _project(self, params: Any, state: TrainState) -> tuple[Any, Any]:
        """The parameters after the phase's projections, and their new states."""
        projectors = self.running.phase.projections
        if not projectors:
            return params, state.projections
        model = self.structure.merge(params, state.model_state, self.root_key)
        states = tuple(
            projections.stateful(projection).apply(
                model, own_state, self._phase_step(state)
            )
            for (_, projection), own_state in zip(
                projectors, state.projections, strict=True
            )
        )
        return nnx.as_pure(nnx.state(model, nnx.Param)), states

    def _decaying(self, state: TrainState, passes: Passes) -> Any:
        """The parameters as the optimizer's weight decay shall see them."""
        if self.running.phase.optimizer.decays_masked:
            return state.params
        model = self.structure.merge(state.params, state.model_state, self.root_key)
        for path, factors in find_factors(model).items():
            ranks = [ranks[path] for ranks in passes if path in ranks]
            if len(ranks) == len(passes):  # else one pass runs at the active rank
                factors.set_rank(jnp.stack(ranks).max(axis=0))
            factors.zero_masked()
        return nnx.as_pure(nnx.state(model, nnx.Param))

    def _freeze(self, tree: Any, frozen: Callable[[Array], Array]) -> Any:
        """A tree like the parameters with `frozen` of what is not trained."""
        if self.pattern.pattern == ".*":
            return tree

        def only_trained(key_path: Any, leaf: Array) -> Array:
            key = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return leaf if self.pattern.fullmatch(key) else frozen(leaf)

        return jax.tree.map_with_path(only_trained, tree)


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
