"""A run's parts from its config, the same in every process."""

from typing import Any

import flax
import jax

from lowrank_jax.version import __version__
from train import distributed, phases
from train.config import to_json
from train.run import Run, open_run


def prepare(config: Any) -> tuple[Run, tuple[phases.Phase, ...]]:
    """Opens a config's data, task and mesh, and builds its phases.

    Every process checks for itself; where one fails, all do.

    Args:
      config: A `ConfigDict` or mapping as in `configs/`.

    Raises:
      UserError: The config does not hold together, or processes differ in it, in the
        versions that they run or in what their data are, as with another tokenizer.
    """

    def check() -> tuple[Run, tuple[phases.Phase, ...]]:
        complete = to_json(config)
        plan = phases.build_phases(complete["phases"])
        return open_run(complete), plan

    run, plan = distributed.together(check)
    about = {"config": run.config, "versions": versions(), "facts": run.data.facts}
    distributed.check_same(about)
    return run, plan


def versions() -> dict[str, str]:
    """Returns the versions that the processes of a run must share."""
    return {
        "lowrank_jax": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
    }
