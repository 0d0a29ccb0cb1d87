"""The phases of a run: what each trains with, built and checked before the first
step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from lowrank_jax.ordered_dropout import SAMPLERS, RankSampler
from lowrank_jax.regularizers import PENALTIES, Penalty
from train import optim, registry


class Phase(NamedTuple):
    """One phase, ready to run.

    Args:
      name: As in the config.
      start: First step.
      end: Step after the last.
      sampler: Ranks for each step.
      distill: Whether sampled passes learn from the full pass.
      label_weight: Share of the labels in a distilled pass.
      passes_loss: How the losses of several passes add up.
      penalties: Added to the loss.
      optimizer: With its schedule over the phase.
      shrink: None, or when and how ranks are cut.
    """

    name: str
    start: int
    end: int
    sampler: RankSampler
    distill: bool
    label_weight: float
    passes_loss: str
    penalties: list[Penalty]
    optimizer: optax.GradientTransformation
    shrink: dict[str, Any] | None


def no_teacher() -> tuple[bool, float]:
    """Sampled passes learn from the labels."""
    return False, 1.0


def full_pass(*, label_weight: float) -> tuple[bool, float]:
    """Sampled passes learn from the full pass of the same step, and from the labels.

    Args:
      label_weight: Share of the labels, in [0, 1].
    """
    if not 0 <= label_weight <= 1:
        raise ValueError(f"label_weight: must be in [0, 1], got {label_weight}.")
    return True, label_weight


TEACHERS = {"none": no_teacher, "full": full_pass}


def build_phases(config: Mapping[str, Any], steps_per_epoch: int) -> list[Phase]:
    """All phases of a config.

    Raises:
      ValueError: Names or arguments that do not exist or do not fit, naming the place.
    """
    phases, start = [], 0
    for index, spec in enumerate(config["phases"]):
        until, where = spec["until"], f"phases[{index}]"
        steps = (
            until["steps"] if "steps" in until else until["epochs"] * steps_per_epoch
        )
        distill, label_weight = registry.build(
            f"{where}.teacher", spec["teacher"], TEACHERS
        )
        phases.append(
            Phase(
                spec["name"],
                start,
                start + steps,
                registry.build(f"{where}.sampler", spec["sampler"], SAMPLERS),
                distill,
                label_weight,
                spec["passes_loss"],
                [
                    registry.build(f"{where}.penalties", penalty, PENALTIES)
                    for penalty in spec["penalties"]
                ],
                optim.make_optimizer(
                    spec["optimizer"], steps, where=f"{where}.optimizer"
                ),
                spec["shrink"] or None,
            )
        )
        start += steps
    return phases


def phase_at(phases: list[Phase], step: int) -> int:
    """Index of the phase that step `step` belongs to (the last one at the very end)."""
    for index, phase in enumerate(phases):
        if step < phase.end:
            return index
    return len(phases) - 1
