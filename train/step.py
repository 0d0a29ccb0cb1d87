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

from lowrank_jax import penalties, projections, samplers
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Ranks
from lowrank_jax.samplers import Choice, RankSampler, SampledRanks
from train import computing
from train import passes as one_pass
from train.phases import Running
from train.sharding import Layout
from train.state import Structure, TrainState, model_state_of
from train.tasks.base import Task

Batch = Mapping[str, Array]
Passes = Sequence[Choice]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
Steps = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    structure: Structure,
    running: Running,
    task: Task,
    root_key: PRNGKeyArray,
    *,
    epoch: int = 0,
    accumulation_steps: int = 1,
    compute_dtype: str = "float32",
    layout: Layout | None = None,
) -> Step:
    """Makes the jitted step of a phase.

    Args:
      structure: The model's structure.
      running: The phase.
      task: What is learned.
      root_key: Everything random in step n comes from `fold_in(root_key, n)`.
      epoch: Of the phase: its pattern says what is trained. The other parameters get no
        gradient and no update; their moments go on as after a zero gradient.
      accumulation_steps: Parts of the batch whose gradients are added, one part after
        the other, so that one part's activations are in memory. All are at the ranks of
        the step; BatchNorm sees part after part.
      compute_dtype: Of products (`train.computing`).
      layout: How the state lies on a mesh; None on one device.
    """
    patterns = running.phase.trainable
    pattern = patterns[epoch % len(patterns)]
    ranks = {path: limits.active for path, limits in structure.limits.items()}
    step = _TrainStep(
        structure,
        running,
        task,
        root_key,
        pattern,
        accumulation_steps,
        compute_dtype,
        layout,
        running.phase.rungs(ranks),
    )
    return jax.jit(step.apply, donate_argnums=0)


def make_train_steps(step: Step) -> Steps:
    """Makes several steps, one after the other in one call of the device; their metrics
    have a leading axis."""

    def apply(state: TrainState, batches: Sequence[Batch]) -> Any:
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)
        return jax.lax.scan(step, state, stacked)

    return jax.jit(apply, donate_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainStep:
    """The step as a pure function; the arguments are those of `make_train_step`, and
    the rungs at which passes run that are cut, none where all are masked."""

    structure: Structure
    running: Running
    task: Task
    root_key: PRNGKeyArray
    pattern: re.Pattern[str]
    accumulation_steps: int
    compute_dtype: str
    layout: Layout | None
    rungs: Sequence[Ranks]

    def apply(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes one step; returns the new state and the metrics of the old one."""
        rank_key, key = jax.random.split(jax.random.fold_in(self.root_key, state.step))
        passes, sampler_state = self._sample(state, rank_key)
        grads, model_state, metrics = self._task_gradients(state, batch, passes, key)
        if self.running.penalties:
            penalize = jax.value_and_grad(self._penalize, has_aux=True)
            (penalty, penalty_states), more = penalize(state.params, state)
            grads = jax.tree.map(jnp.add, grads, more)
        else:
            penalty, penalty_states = jnp.float32(0), ()
        if self.layout is not None:
            grads = self.layout.constrain(grads)
        updates, opt_state = self.running.optimizer.update(
            grads, state.opt_state, self._decaying(state, passes)
        )
        updates = self._freeze(updates, jnp.zeros_like)
        params, projection_states = self._project(
            optax.apply_updates(state.params, updates), state
        )
        metrics |= {"penalty": penalty, **_gradient_metrics(grads)}
        new = TrainState(
            state.step + 1,
            params,
            model_state,
            opt_state,
            sampler_state,
            penalty_states,
            projection_states,
        )
        return (new if self.layout is None else self.layout.constrain(new)), metrics

    def _phase_step(self, state: TrainState) -> Array:
        return state.step - self.running.start

    def _sample(self, state: TrainState, key: PRNGKeyArray) -> tuple[Passes, Any]:
        """The ranks of each pass; `{}` are the structure's own, all that is active."""
        phase = self.running.phase
        sampler, given = phase.sampler, (key, self._phase_step(state))
        if self.rungs:
            passes, sampler_state = sampler.choose(state.sampler_state, *given)
        else:
            ranks, sampler_state = sampler.sample(state.sampler_state, *given)
            passes = _passes(ranks, sampler)
        if phase.teacher and phase.teacher.full_pass and not phase.sampler.full_first:
            passes.insert(0, Choice(ranks={}))
        return passes, sampler_state

    def _task_gradients(
        self, state: TrainState, batch: Batch, passes: Passes, key: PRNGKeyArray
    ) -> tuple[Any, Any, dict[str, Array]]:
        """Gradients of the task's loss over the batch, part by part; the new model
        state, and metrics."""
        gradients = jax.grad(self._loss, has_aux=True)
        if self.accumulation_steps == 1:
            grads, (model_state, sums, losses) = gradients(
                state.params, state.model_state, batch, passes, key
            )
            return grads, model_state, _metrics(sums, losses)

        own_ranks = self.running.phase.sampler.per_example

        def part_gradients(model_state: Any, part: Any) -> Any:
            batch, ranks, key = part
            own = [Choice(ranks=each) for each in ranks] if own_ranks else passes
            return gradients(state.params, model_state, batch, own, key)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            total, model_state = carry
            grads, (model_state, sums, losses) = part_gradients(model_state, part)
            # a part's loss is the mean over its weight
            weighed = jax.tree.map(lambda x: x * sums["weight"], (grads, losses))
            return (jax.tree.map(jnp.add, total, (*weighed, sums)), model_state), None

        count = self.accumulation_steps
        ranks = [_parts_of(p.ranks, count) for p in passes] if own_ranks else None
        parts = (self._parts(batch), ranks, jax.random.split(key, count))
        first = jax.tree.map(lambda x: x[0], parts)
        grads, (_, sums, losses) = jax.eval_shape(
            part_gradients, state.model_state, first
        )
        zeros = optax.tree.zeros_like((grads, losses, sums))
        (total, model_state), _ = jax.lax.scan(add, (zeros, state.model_state), parts)
        grads, losses, sums = total
        grads, losses = jax.tree.map(lambda x: x / sums["weight"], (grads, losses))
        return grads, model_state, _metrics(sums, losses)

    def _parts(self, batch: Batch) -> Batch:
        """The batch as (parts, rows of a part, ...), each device's rows divided."""

        def parts(array: Array) -> Array:
            count = self.accumulation_steps
            strided = array.reshape(-1, count, *array.shape[1:])
            return jnp.swapaxes(strided, 0, 1)

        batch = jax.tree.map(parts, dict(batch))
        return batch if self.layout is None else self.layout.placement.parts(batch)

    def _loss(
        self,
        params: Any,
        model_state: Any,
        batch: Batch,
        passes: Passes,
        key: PRNGKeyArray,
    ) -> tuple[Array, Any]:
        """Loss of the first pass: the task's. Of each further one: the same, or with a
        teacher `target_weight` times that plus `1 - target_weight` times the task's
        `distill` towards the teacher.

        The first pass is the full model whenever there are several; it alone updates
        BatchNorm, the others use their own batch statistics. With `pass_parts` above 1
        each of the others has its own part of the examples, and the teacher's outputs
        on them.
        """
        task, phase = self.task, self.running.phase
        if self.layout is not None:
            params = self.layout.gather(params)
        input_key, model_key = jax.random.split(key)
        inputs = task.inputs(batch, input_key)
        parts = phase.pass_parts
        first_part = jax.random.randint(jax.random.fold_in(key, 1), (), 0, parts)
        losses, first_outputs, taught, new_state = [], None, None, None
        for number, choice in enumerate(passes):
            rows = (inputs, batch, taught)
            if number > 0 and parts > 1:
                rows = one_pass.part_of(rows, parts, (first_part + number) % parts)
            operands = (model_state, model_key, *rows)
            forward = self._pass if losses else self._first_pass
            loss, more = one_pass.run(forward, choice, self.rungs, params, operands)
            if not losses:
                first_outputs, new_state = more
                if phase.teacher is not None:
                    taught = phase.teacher.outputs(first_outputs, inputs)
            losses.append(loss)
        weights = phase.pass_weights or (1.0,) * len(losses)
        first, *others = (x * weight for x, weight in zip(losses, weights, strict=True))
        share = 1 / len(others) if others and phase.passes_loss == "mean" else 1
        total = first + share * sum(others)
        named = {"loss": total, **{f"loss_pass_{n}": x for n, x in enumerate(losses)}}
        return total, (new_state, task.sums(first_outputs, batch), named)

    def _first_pass(
        self, place: one_pass.Place, params: Any, operands: Any
    ) -> tuple[Array, Any]:
        """The task's loss; the outputs, and the model state they leave behind."""
        model_state, key, inputs, batch, _ = operands
        params = self._freeze(params, jax.lax.stop_gradient)
        model = place(self.structure.merge(params, model_state, key))
        one_device = self.layout is None or self.layout.placement.mesh.size == 1
        computing.prepare(model, self.compute_dtype, one_device=one_device)
        outputs = model(*inputs)
        return self.task.loss(outputs, batch), (outputs, model_state_of(model))

    def _pass(
        self, place: one_pass.Place, params: Any, operands: Any
    ) -> tuple[Array, None]:
        """The loss towards the targets, or towards the teacher as well."""
        teacher, batch, taught = self.running.phase.teacher, *operands[-2:]
        loss, (outputs, _) = self._first_pass(place, params, operands)
        if teacher is not None:
            distilled = self.task.distill(outputs, taught, batch)
            loss = (
                teacher.target_weight * loss + (1 - teacher.target_weight) * distilled
            )
        return loss, None

    def _penalize(self, params: Any, state: TrainState) -> tuple[Array, Any]:
        """The sum of the phase's penalties, and their new states."""
        params = self._freeze(params, jax.lax.stop_gradient)
        model = self.structure.merge(params, state.model_state, self.root_key)
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
        tables = samplers.table_of(self.rungs).tables if self.rungs else {}
        each = [samplers.ranks_of(choice, tables) for choice in passes]
        for path, factors in find_factors(model).items():
            ranks = [ranks[path] for ranks in each if path in ranks]
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


def _passes(ranks: SampledRanks, sampler: RankSampler) -> list[Choice]:
    if sampler.passes == 1:
        return [Choice(ranks=ranks)]
    return [
        Choice(ranks={path: rank[n] for path, rank in ranks.items()})
        for n in range(sampler.passes)
    ]


def _parts_of(ranks: SampledRanks, count: int) -> SampledRanks:
    """One rank per example, (..., batch), as (parts, ..., rows of a part)."""
    return {
        path: jnp.moveaxis(rank.reshape(*rank.shape[:-1], -1, count), -1, 0)
        for path, rank in ranks.items()
    }


def _metrics(
    sums: Mapping[str, Array], losses: Mapping[str, Array]
) -> dict[str, Array]:
    """The losses, and what the task sums up beside them, divided by its weight."""
    means = {
        name: value / sums["weight"]
        for name, value in sums.items()
        if name not in ("weight", "loss")
    }
    return {**losses, **means}


def _gradient_metrics(grads: Any) -> dict[str, Array]:
    """The norm of all gradients, and which is the first that is not finite: its place
    among the parameters, -1 if all are."""
    leaves = jax.tree.leaves(grads)
    wide = [g.astype(jnp.promote_types(g.dtype, "float32")) for g in leaves]
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in wide])
    bad = ~jnp.isfinite(squares)
    first = jnp.where(bad.any(), jnp.argmax(bad), -1)
    return {
        "gradient_norm": jnp.sqrt(jnp.sum(squares)),
        "nonfinite_gradient": first.astype(jnp.int32),
    }
