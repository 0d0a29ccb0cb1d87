"""The model of the latest checkpoint that is whole, on the devices there are."""

from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.errors import DamagedCheckpoint
from train.model import about, load_model
from train.report import logs
from train.sharding import any_devices


def load_latest(
    path: str | Path, *, allow_imports: Sequence[str]
) -> tuple[checkpoint.Saved, nnx.Module]:
    """Loads a model, on the mesh it was trained on or, where that does not fit, on
    what there is.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir; a damaged checkpoint
        is named, and the one before it is taken.
      allow_imports: Packages that names in the checkpoint may be imported from.

    Raises:
      DamagedCheckpoint: None is whole.
      UserError: It was written by something else.
    """
    damaged: list[DamagedCheckpoint] = []
    for step in checkpoint.complete_steps(path) or [Path(path)]:
        try:
            saved = checkpoint.open_checkpoint(step)
            config, _, _ = about(saved)
            placement = any_devices(config["mesh"])
            model = load_model(saved, allow_imports=allow_imports, placement=placement)
        except DamagedCheckpoint as error:
            damaged.append(error)
            logs.say(f"skipped: {error}")
        else:
            return saved, model
    raise damaged[0]
