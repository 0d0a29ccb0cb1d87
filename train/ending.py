"""The end of a phase: its actions, and the optimizer state that goes with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from flax import nnx

from lowrank_jax import active, errors, optimizer_state, paths, shrinking, surgery
from train.actions import Context, Kind
from train.phases import Running, Selected
from train.report import logs

REASONS = {
    Kind.FACTORIZED: "squares of a kernel's gradients say nothing about its factors'",
    Kind.ROTATED: "its columns are not the ones the moments belong to",
    Kind.MERGED: "moments of factors say nothing about those of their product",
    Kind.CUT: "it has no form for fewer columns",
}
"""Why a part of an optimizer state starts anew after a change of this kind."""


class Ended(NamedTuple):
    """What is left of a phase.

    Args:
      model: After its actions.
      opt_state: The optimizer state that goes with it, where it is kept.
      selected: For later phases.
    """

    model: nnx.Module
    opt_state: optax.OptState
    selected: Selected


def end_phase(
    running: Running,
    place: str,
    model: nnx.Module,
    opt_state: optax.OptState,
    context: Callable[[Selected], Context],
    selected: Selected,
    *,
    keep: bool,
) -> Ended:
    """Runs a phase's actions.

    Args:
      running: The phase.
      place: How messages name it.
      model: After its last step.
      opt_state: After its last step.
      context: What actions may ask, given what was selected so far.
      selected: What was selected before.
      keep: Whether the next phase goes on with the optimizer state.
    """
    for name, action in running.phase.on_end:
        with errors.at(f"{place}: on_end ({name})"):
            choice = action.choose(model, context(selected))
            old, model = model, action.apply(model, choice)
        selected = selected.after(action, choice)
        if action.selects:
            logs.say(f"{name}: {action.selects.replace('_', ' ')} {choice}")
        elif action.kind is not Kind.SAME:
            logs.say(f"{name}: ranks {active.get_ranks(model)}")
        if keep:
            opt_state, restarted = carry_opt_state(
                action.kind, old, model, opt_state, running.optimizer
            )
            for part in restarted:
                reason = REASONS[action.kind]
                logs.say(f"{name}: the optimizer's {part} starts anew, as {reason}")
    return Ended(model, opt_state, selected)


def carry_opt_state(
    kind: Kind,
    old_model: nnx.Module,
    new_model: nnx.Module,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
) -> tuple[optax.OptState, list[str]]:
    """Returns the optimizer state for the changed model, and the parts that restart.

    Args:
      kind: Of the change.
      old_model: Before it.
      new_model: After it.
      opt_state: Before it.
      optimizer: The phase's.
    """
    if kind is Kind.SAME:
        return opt_state, []
    if kind is Kind.CUT:
        return shrinking.carry_opt_state(old_model, new_model, opt_state, optimizer)
    params = nnx.as_pure(nnx.state(new_model, nnx.Param))
    fresh = optimizer.init(params)
    if kind is not Kind.FACTORIZED:
        return fresh, ["state"]
    # momentum goes over by the chain rule, through the merge of what is new
    graphdef, _, rest = nnx.split(new_model, nnx.Param, ...)
    changed = {*paths.find_factors(new_model)} - {*paths.find_factors(old_model)}

    def to_old(params: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        return nnx.as_pure(nnx.state(surgery.merge(model, changed), nnx.Param))

    return optimizer_state.convert_opt_state(opt_state, fresh, to_old, params)
