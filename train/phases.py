"""The phases of a run: what each trains with, built and checked before the first
step."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx

from lowrank_jax import errors, factorization
from lowrank_jax.errors import UserError
from lowrank_jax.penalties import PENALTIES, Penalty
from lowrank_jax.projections import PROJECTIONS, Projection
from lowrank_jax.samplers import SAMPLERS, RankSampler
from lowrank_jax.selection import curves, solvers
from train import optim, registry
from train.actions import ACTIONS, Action

StableRanks = dict[str, Any]
"""Stable rank of each layer's matrix: numbers, nested lists for stacks."""


class Condition(NamedTuple):
    """When a phase ends early.

    Args:
      every_steps: How often to measure, from the phase's first step on.
      measure: What to measure of the model, as JSON values.
      is_met: Whether the measurements so far end the phase.
    """

    every_steps: int
    measure: Callable[[nnx.Module], StableRanks]
    is_met: Callable[[Sequence[StableRanks]], bool]


class Phase(NamedTuple):
    """One phase, ready to run.

    Args:
      name: As in the config.
      start: First step.
      end: Step after the last; with a condition, the latest that is possible.
      condition: What ends it earlier, or None.
      sampler: Ranks for each step.
      distill: Whether sampled passes learn from the full pass.
      label_weight: Share of the labels in a distilled pass.
      passes_loss: How the losses of several passes add up.
      penalties: Added to the loss.
      projections: Applied to the factors after each update.
      trainable: Which parameters are trained, one pattern for each epoch in turn.
      optimizer: With its schedule over the phase.
      shrink: None, or when and how ranks are cut.
      on_end: Changes of the model after the last step.
    """

    name: str
    start: int
    end: int
    condition: Condition | None
    sampler: RankSampler
    distill: bool
    label_weight: float
    passes_loss: str
    penalties: list[Penalty]
    projections: list[Projection]
    trainable: list[re.Pattern[str]]
    optimizer: optax.GradientTransformation
    shrink: dict[str, Any] | None
    on_end: list[tuple[str, Action]]


def no_teacher() -> tuple[bool, float]:
    """Sampled passes learn from the labels."""
    return False, 1.0


def full_pass(*, label_weight: float) -> tuple[bool, float]:
    """Sampled passes learn from the full pass of the same step, and from the labels.

    Args:
      label_weight: Share of the labels, in [0, 1].
    """
    if not 0 <= label_weight <= 1:
        raise UserError(f"label_weight: must be in [0, 1], got {label_weight}.")
    return True, label_weight


TEACHERS = {"none": no_teacher, "full": full_pass}


def stable_ranks_stand_still(
    *, every_steps: int, window: int = 15, points: int = 11, tolerance: float = 0.1
) -> Condition:
    """Cuttlefish's switch: no layer's stable rank moves any more.

    Args:
      every_steps: How often to measure (their code: once an epoch).
      window: As in `solvers.stands_still`.
      points: As in `solvers.stands_still`.
      tolerance: As in `solvers.stands_still`, per measurement.
    """
    if min(every_steps, window) < 1 or points < 2 or tolerance < 0:
        raise UserError(
            "stable_ranks_stand_still: every_steps and window must be >= 1, points >="
            f" 2, tolerance >= 0, got {every_steps}, {window}, {points}, {tolerance}."
        )

    def is_met(history: Sequence[StableRanks]) -> bool:
        rows = [np.concatenate([np.ravel(x) for x in row.values()]) for row in history]
        return solvers.stands_still(
            np.stack(rows), window=window, points=points, tolerance=tolerance
        )

    return Condition(every_steps, stable_ranks, is_met)


CONDITIONS = {"stable_ranks_stand_still": stable_ranks_stand_still}


def stable_ranks(model: nnx.Module) -> StableRanks:
    """The stable rank of each layer that has, or can have, a low-rank form."""
    matrices = factorization.kernel_matrices(model)
    return {p: rank.tolist() for p, rank in curves.stable_ranks(matrices).items()}


def build_phases(config: Mapping[str, Any], steps_per_epoch: int) -> list[Phase]:
    """All phases of a config, each at the latest start that is possible.

    Raises:
      ValueError: Names or arguments that do not exist or do not fit, naming the place.
    """
    phases: list[Phase] = []
    selects = False
    for index, spec in enumerate(config["phases"]):
        start = phases[-1].end if phases else 0
        targets = {} if selects else None
        phases.append(build_phase(config, index, start, steps_per_epoch, targets))
        selects = selects or any(
            action["name"] == "select" for action in spec["on_end"]
        )
    return phases


def build_phase(
    config: Mapping[str, Any],
    index: int,
    start: int,
    steps_per_epoch: int,
    target_ranks: Mapping[str, Any] | None,
) -> Phase:
    """One phase of a config.

    Args:
      config: The whole config as plain values.
      index: Which phase.
      start: Step at which it begins.
      steps_per_epoch: Steps of an epoch.
      target_ranks: What "selected" stands for in penalties; None before `select`.
    """
    spec, where = config["phases"][index], f"phases[{index}]"
    _check_optimizer_state(config, index)
    end = _end(config, index, start, steps_per_epoch)
    condition = spec["until"].get("condition")
    distill, label_weight = _built(f"{where}.teacher", spec["teacher"], TEACHERS)
    return Phase(
        spec["name"],
        start,
        end,
        condition and _built(f"{where}.until.condition", condition, CONDITIONS),
        _built(f"{where}.sampler", spec["sampler"], SAMPLERS),
        distill,
        label_weight,
        spec["passes_loss"],
        [
            _built(
                f"{where}.penalties",
                _with_targets(penalty, target_ranks, f"config.{where}.penalties"),
                PENALTIES,
            )
            for penalty in spec["penalties"]
        ],
        [
            _built(f"{where}.projections", projection, PROJECTIONS)
            for projection in spec["projections"]
        ],
        [optim.pattern(text, f"{where}.trainable") for text in spec["trainable"]],
        optim.make_optimizer(
            spec["optimizer"], end - start, where=f"{where}.optimizer"
        ),
        spec["shrink"] or None,
        [
            (action["name"], _built(f"{where}.on_end", action, ACTIONS))
            for action in spec["on_end"]
        ],
    )


def needs_initial_stable_ranks(config: Mapping[str, Any]) -> bool:
    """Whether a phase of the config refers to the stable ranks at the first step."""
    actions = (action for phase in config["phases"] for action in phase["on_end"])
    return any(action["name"] == "factorize_at_stable_rank" for action in actions)


def _end(
    config: Mapping[str, Any], index: int, start: int, steps_per_epoch: int
) -> int:
    spec = config["phases"][index]
    until = spec["until"]
    if "steps" in until:
        return start + until["steps"]
    if "epochs" in until:
        return start + until["epochs"] * steps_per_epoch
    end = until["to_epoch"] * steps_per_epoch
    if end <= start:
        raise UserError(
            f"config.phases[{index}] ({spec['name']}).until: to_epoch must be after the"
            f" phases before it, which may last to step {start}, got"
            f" {until['to_epoch']} (step {end}). Raise it."
        )
    return end


def _built(where: str, spec: Mapping[str, Any], table: registry.Table) -> Any:
    with errors.at(f"config.{where}"):
        return registry.build(spec, table)


def _with_targets(
    spec: Mapping[str, Any], target_ranks: Mapping[str, Any] | None, where: str
) -> Mapping[str, Any]:
    """A penalty with the ranks that were selected, where it asks for them."""
    args = spec["args"]
    if "target_ranks" not in args or args["target_ranks"] != "selected":
        return spec
    if target_ranks is None:
        raise UserError(
            f"{where}: target_ranks 'selected' needs an action 'select' at the end of"
            " an earlier phase, got none. Add one, or give ranks by path."
        )
    return {**spec, "args": {**args, "target_ranks": target_ranks}}


def _check_optimizer_state(config: Mapping[str, Any], index: int) -> None:
    """A state can be kept between equal optimizers only."""
    specs = config["phases"]
    if specs[index]["optimizer_state"] == "new":
        return
    same = ("name", "args", "weight_decay", "decayed", "clip_norm")
    before, here = (specs[max(n, 0)]["optimizer"] for n in (index - 1, index))
    if index == 0 or any(before[key] != here[key] for key in same):
        raise UserError(
            f"config.phases[{index}].optimizer_state: 'kept' needs a phase before it"
            f" with the same optimizer but for learning rate and schedule, got {here}"
            f" after {before if index else None}. Use 'new', or make them equal."
        )
