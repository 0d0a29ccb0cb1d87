"""Teachers: what the sampled passes of a step learn from beside the targets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank_jax.errors import UserError


class Teacher(NamedTuple):
    """Whom a pupil learns from.

    Args:
      outputs: From the outputs of the step's first pass and the model's inputs to the
        teacher's outputs, through which no gradient flows.
      target_weight: Share of the loss that comes from the targets, in [0, 1]; the rest
        is the task's `distill`.
      full_pass: Whether the first pass must be the full model.
    """

    outputs: Callable[[Any, tuple[Any, ...]], Any]
    target_weight: float
    full_pass: bool


def none() -> None:
    """Names no teacher: every pass learns from the targets."""
    return None


def full(*, target_weight: float) -> Teacher:
    """Takes the full pass of the same step (Horvath et al., 2021).

    Args:
      target_weight: Share of the targets, in [0, 1].
    """
    if not 0 <= target_weight <= 1:
        raise UserError(
            f"target_weight: must be in [0, 1], got {target_weight}. It is the share"
            " of the targets in the loss of a sampled pass."
        )

    def outputs(first_outputs: Any, inputs: tuple[Any, ...]) -> Any:
        del inputs
        return jax.lax.stop_gradient(first_outputs)

    return Teacher(outputs, target_weight, full_pass=True)


TEACHERS: dict[str, Callable[..., Teacher | None]] = {"none": none, "full": full}
"""The teachers by the name they have in configs."""
