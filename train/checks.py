"""What must hold before the first step: the folder, the start, every phase."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax import active, checkpoint, errors, paths, penalties, projections
from lowrank_jax.errors import UserError
from lowrank_jax.samplers import RankSampler
from train import context, distributed, evaluation, phases
from train.run import Run
from train.state import fill_state, split_model
from train.step import make_train_step, make_train_steps


def check_phases(run: Run, plan: Sequence[phases.Phase], model: nnx.Module) -> None:
    """Traces every phase on the model it will have, without any work.

    Where one of several processes finds a mistake, all stop.

    The training step (forward pass, loss, penalties, update, projections) and the
    evaluation run on abstract arrays; the actions at a phase's end choose with what can
    be known, and the largest choice is applied, so that the next phase is checked on
    the structure it will have.

    Args:
      run: What the run is about.
      plan: All phases.
      model: The model of the first one.

    Raises:
      UserError: Naming the phase. A bug in the user's own code keeps its type, and a
        note says in which phase it came up.
    """
    distributed.together(lambda: _check_phases(run, plan, model))


def _check_phases(run: Run, plan: Sequence[phases.Phase], model: nnx.Module) -> None:
    model = _without_values(model)
    selected = phases.NOTHING_SELECTED
    spans = phases.spans(plan, run.steps_per_epoch)
    for index, (phase, (start, end)) in enumerate(zip(plan, spans, strict=True)):
        place = phases.place_of(index, phase.name)
        with _in(place):
            run.placement.check(model)
            running = phase.begin(start, end, selected)
            sampler = run.config["phases"][index]["sampler"]["name"]
            _check_fit(running, sampler, model)
            _check_parts(run, phase)
            _trace(run, running, model)
        for name, action in phase.on_end:
            with _in(f"{place}: on_end ({name})"):
                choice = action.choose(model, context.before_run(run, selected))
                selected = selected.after(action, choice)
                largest = action.largest(model, choice)
                model = _applied(action, model, largest)


def known_ranks(model: nnx.Module) -> dict[str, Any]:
    """Returns the active ranks, of an abstract model the allocated ones."""
    return {path: at.active for path, at in active.rank_limits(model).items()}


@contextlib.contextmanager
def _in(place: str) -> Iterator[None]:
    """Names the place in a user's mistake, and in a note on any other exception."""
    try:
        with errors.at(place):
            yield
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"This came up in the check of {place}, before the first step.")
        raise


def _without_values(model: nnx.Module) -> nnx.Module:
    """The model without its values, but for the ranks that are known."""
    ranks = known_ranks(model)
    model = nnx.eval_shape(nnx.clone, model)
    for path, factors in paths.find_factors(model).items():
        factors.set_rank(ranks[path])
    return model


def _applied(action: Any, model: nnx.Module, choice: Any) -> nnx.Module:
    changed = nnx.eval_shape(lambda model: action.apply(model, choice), model)
    return _without_values(changed)


def _check_fit(running: phases.Running, sampler: str, model: nnx.Module) -> None:
    """What the phase asks of the model's layers and parameters."""
    phase, layers = running.phase, paths.find_factors(model)
    if not layers:
        _check_dense(phase, sampler)
    if fixed := [path for path, factors in layers.items() if not factors.nested]:
        raise UserError(
            f"layers must be in a form that is trained, got another for {fixed}. Start"
            " from the factored checkpoint that they were cut from, or merge them."
        )
    keys = list(checkpoint.flatten(checkpoint.model_items(model)["params"]))
    patterns = {f"trainable {p.pattern!r}": p.pattern for p in phase.trainable}
    if phase.optimizer.decays:
        patterns["optimizer.decayed"] = phase.optimizer.decayed
    for where, text in patterns.items():
        if not any(re.fullmatch(text, key) for key in keys):
            raise UserError(
                f"{where}: must match a parameter, got {text!r} among {sorted(keys)}."
                " Patterns must match the whole path."
            )
    if phase.sampler.check is not None:
        phase.sampler.check(known_ranks(model))
    for penalty in running.penalties:
        penalties.check_stateless(penalty, model)
    for _, projection in phase.projections:
        projections.check_stateless(projection, model)


def _check_dense(phase: phases.Phase, sampler: str) -> None:
    """What acts on factors has nothing to act on in a dense model."""
    idle = [
        key for key in ("penalties", "projections", "shrink") if getattr(phase, key)
    ]
    if sampler != "full":
        idle.append("sampler")
    if idle:
        raise UserError(
            f"{', '.join(idle)}: need low-rank layers, got a dense model. Use the"
            " sampler 'full' and nothing else, or make layers low-rank in"
            " config.rank_rules."
        )


def _check_parts(run: Run, phase: phases.Phase) -> None:
    """Each device gets as many examples of a pass's part as any other."""
    steps, shards = run.config["accumulation_steps"], run.placement.batch_shards
    if run.batch_size % (multiple := steps * shards * phase.pass_parts):
        raise UserError(
            f"pass_parts: config.data.batch_size must be a multiple of {multiple}, that"
            f" is {phase.pass_parts} parts, times config.accumulation_steps {steps},"
            f" times the {shards} parts over which config.mesh splits a batch, got"
            f" {run.batch_size}. Change one of them."
        )


def _trace(run: Run, running: phases.Running, model: nnx.Module) -> None:
    """Runs the evaluation and the phase's step on abstract arrays."""
    ranks, sampler = known_ranks(model), running.phase.sampler
    structure, params, model_state = split_model(model)
    state = jax.eval_shape(
        lambda *arrays: fill_state(structure, *arrays, running, 0),
        params,
        model_state,
        sampler.init(ranks),
    )
    if sampler.per_example:
        _check_examples(sampler, state.sampler_state, run.batch_size)
    size = run.config["data"]["eval_batch_size"]
    batch = _abstract_batch(run, size)
    batch["weight"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    evaluate = evaluation.make_sums(structure, run.task)
    arrays = evaluation.settable(structure, ranks)
    _check_sums(run, jax.eval_shape(evaluate, params, model_state, arrays, batch))
    for epoch in range(len(running.phase.trainable)):
        step = make_train_step(
            structure,
            running,
            run.task,
            jax.random.key(0),
            epoch=epoch,
            accumulation_steps=run.config["accumulation_steps"],
            compute_dtype=run.config["compute_dtype"],
            layout=run.placement.layout(model),
        )
        batch, count = (
            _abstract_batch(run, run.batch_size),
            run.config["steps_per_call"],
        )
        jax.eval_shape(step, state, batch)
        if count > 1:  # a state whose types change is refused
            jax.eval_shape(make_train_steps(step), state, [batch] * 2)


def _abstract_batch(run: Run, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the data set without its values."""
    return {
        name: jax.ShapeDtypeStruct((size, *about["shape"]), about["dtype"])
        for name, about in run.data.facts["arrays"].items()
    }


def _check_examples(sampler: RankSampler, state: Any, batch_size: int) -> None:
    """One rank per example needs as many as the batch has."""
    sampled, _ = jax.eval_shape(sampler.sample, state, jax.random.key(0), jnp.int32(0))
    sizes = {rank.shape[-1] for rank in sampled.values()}
    if sizes - {batch_size}:
        raise UserError(
            "sampler: per_example's batch_size must be config.data.batch_size"
            f" {batch_size}, got {sizes}. Make them equal."
        )


def _check_sums(run: Run, sums: Mapping[str, Any]) -> None:
    """A task's evaluation must give scalars, a weight, and its headline figure."""
    problems = [
        f"config.task: sums must be scalars, got {name} of shape {value.shape}."
        " Sum over the batch."
        for name, value in sums.items()
        if value.shape != ()
    ]
    if "weight" not in sums:
        problems.append(
            f"config.task: sums must have a 'weight', got {sorted(sums)}."
            " Add the number of examples."
        )
    if not problems:
        figures = run.task.figures(dict.fromkeys(sums, 1.0))
        missing = {"loss", run.task.headline} - set(figures)
        if missing:
            problems.append(
                f"config.task: figures must have {sorted(missing)}, got"
                f" {sorted(figures)}."
                " Return them from figures."
            )
    errors.raise_all(problems)
