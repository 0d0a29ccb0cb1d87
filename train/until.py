"""How long a phase is: steps or epochs, and conditions that end it sooner."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lowrank_jax import errors, factorization
from lowrank_jax.errors import UserError
from lowrank_jax.selection import curves, spectral
from train import registry, schema

StableRanks = dict[str, Any]
"""Stable rank of each layer's matrix: numbers, nested lists for stacks."""

LENGTHS = ("steps", "epochs", "to_epoch")
"""So many steps, so many epochs, or to this epoch of the run."""

UNTIL = {**dict.fromkeys(LENGTHS, int), "condition": schema.NAMED}
"""What the end of a phase may hold in its config."""


class Condition(NamedTuple):
    """When a phase ends early.

    Args:
      every_steps: How often to measure, from the phase's first step on.
      measure: What to measure of the model, as JSON values.
      is_met: Whether the measurements so far end the phase.
    """

    every_steps: int
    measure: Callable[[nnx.Module], Any]
    is_met: Callable[[Sequence[Any]], bool]


class Until(NamedTuple):
    """The end of a phase.

    Args:
      unit: One of `LENGTHS`.
      count: How many of them.
      condition: What ends the phase before that, or None.
    """

    unit: str
    count: int
    condition: Condition | None

    def end(self, start: int, steps_per_epoch: int) -> int:
        """Returns the step after the phase's last, should no condition end it sooner.

        Raises:
          UserError: `to_epoch` is over when the phase begins.
        """
        if self.unit == "steps":
            return start + self.count
        if self.unit == "epochs":
            return start + self.count * steps_per_epoch
        end = self.count * steps_per_epoch
        if end <= start:
            raise UserError(
                "until: to_epoch must be after the phases before it, which may last to"
                f" step {start}, got {self.count} (step {end}). Raise it."
            )
        return end


def build_until(spec: Mapping[str, Any]) -> Until:
    """Builds the end of a phase from its config.

    Raises:
      UserError: Not exactly one of `LENGTHS`, or a condition that does not exist.
    """
    lengths = {key: value for key, value in spec.items() if key != "condition"}
    ((unit, count),) = lengths.items() if len(lengths) == 1 else ((None, None),)
    if unit not in LENGTHS or type(count) is not int or count < 1:
        raise UserError(
            "must be {'steps': n}, {'epochs': n} or {'to_epoch': n} with n >= 1, and"
            f" may have a 'condition', got {dict(spec)}. Give the phase a length."
        )
    condition = None
    if "condition" in spec:
        condition = registry.build_checked(
            spec["condition"], CONDITIONS, lambda made: isinstance(made, Condition)
        )
    return Until(unit, count, condition)


def complete_until(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out the default arguments of the condition, if there is one."""
    if "condition" not in spec:
        return dict(spec)
    errors.raise_all(schema.compare(spec["condition"], schema.NAMED, "condition"))
    condition = registry.complete(spec["condition"], CONDITIONS)
    return {**spec, "condition": condition}


def stable_ranks(model: nnx.Module) -> StableRanks:
    """Measures the stable rank of each layer that has, or can have, a low-rank form."""
    matrices = factorization.kernel_matrices(model)
    return {p: rank.tolist() for p, rank in curves.stable_ranks(matrices).items()}


def stable_ranks_stand_still(
    *, every_steps: int, window: int = 15, points: int = 11, tolerance: float = 0.1
) -> Condition:
    """Makes Cuttlefish's switch: no layer's stable rank moves any more.

    Args:
      every_steps: How often to measure (their code: once an epoch).
      window: As in `spectral.stands_still`.
      points: As in `spectral.stands_still`.
      tolerance: As in `spectral.stands_still`, per measurement.
    """
    if min(every_steps, window) < 1 or points < 2 or tolerance < 0:
        raise UserError(
            "every_steps and window must be >= 1, points >= 2, tolerance >= 0, got"
            f" {every_steps}, {window}, {points}, {tolerance}. Correct them."
        )

    def is_met(history: Sequence[StableRanks]) -> bool:
        rows = [np.concatenate([np.ravel(x) for x in row.values()]) for row in history]
        return spectral.stands_still(
            np.stack(rows), window=window, points=points, tolerance=tolerance
        )

    return Condition(every_steps, stable_ranks, is_met)


CONDITIONS: dict[str, Callable[..., Condition]] = {
    "stable_ranks_stand_still": stable_ranks_stand_still
}
"""The conditions by the name they have in configs."""
