"""When ranks are cut while a phase runs, and what is worth a cut."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import schema


class Shrink(NamedTuple):
    """When and how ranks are cut while a phase runs.

    Args:
      every_epochs: How often, counted over the run; 0 for no epoch.
      every_steps: The same in steps; one of the two is above 0.
      threshold: Of `lowrank_jax.tail_ranks`.
      multiple: Of `lowrank_jax.tail_ranks`.
      least_share: Of the model's parameters, that a cut must take: new shapes are
        compiled anew, so that smaller ones wait for more; 0 for none that waits. The
        last cut in a phase never does.
    """

    every_epochs: int
    every_steps: int
    threshold: float
    multiple: int
    least_share: float

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Returns whether ranks are cut at a step."""
        return not step % self._steps(steps_per_epoch)

    def waits(self, share: float, left: int, steps_per_epoch: int) -> bool:
        """Returns whether a cut is left for later.

        Args:
          share: Of the parameters, that it takes.
          left: Steps to the end of the phase.
          steps_per_epoch: Of the run.
        """
        return share < self.least_share and left >= self._steps(steps_per_epoch)

    def _steps(self, steps_per_epoch: int) -> int:
        return self.every_steps or self.every_epochs * steps_per_epoch


SHRINK = Shrink.__annotations__
"""What the rule of a config holds, if it is not empty."""


def build_shrink(spec: Mapping[str, Any]) -> Shrink | None:
    """Builds the rule of a config; None for `{}`, which never cuts.

    Raises:
      UserError: Other keys, or numbers that make no rule.
    """
    if not spec:
        return None
    errors.raise_all(schema.compare(spec, SHRINK, "a rule"))
    often = (spec["every_epochs"], spec["every_steps"])
    if min(often) != 0 or max(often) < 1:
        raise UserError(
            "one of every_epochs and every_steps must be 0 and the other at least 1,"
            f" got {dict(spec)}. Correct them; {{}} is for never."
        )
    if spec["multiple"] < 1 or not spec["threshold"] >= 0:
        raise UserError(
            "multiple must be at least 1, threshold at least 0, got"
            f" {dict(spec)}. Correct them; {{}} is for never."
        )
    if not 0 <= spec["least_share"] < 1:
        raise UserError(
            f"least_share must be in [0, 1), got {spec['least_share']}. Use 0 for every"
            " cut as soon as it is due."
        )
    return Shrink(**spec)
