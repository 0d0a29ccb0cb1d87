"""What tests of cutting and evaluating a run share: its config, a load and a cut."""

from pathlib import Path
from typing import Any

import support
from flax import nnx

from configs import common
from lowrank_jax import checkpoint
from train import checkpoints, selecting
from train.model import load_model

FULL = {"head": 10, "hidden/0": 64}
FIGURES = {"accuracy", "loss", "params", "stored", "macs", "ranks"}


def make_config(model: str, args: dict[str, Any], epochs: int) -> Any:
    phase = common.phase(
        name="only",
        until={"epochs": epochs},
        sampler={"name": "matryoshka", "args": {"fractions": (1.0, 0.25)}},
        optimizer=common.optimizer("adam", learning_rate=1e-2),
    )
    choice = {"name": model, "args": args}
    return support.make_config(phase, model=choice, checkpoint_every_epochs=0, seed=1)


def load(path: Path) -> nnx.Module:
    saved = checkpoint.open_checkpoint(path)
    model = load_model(saved, allow_imports=[])
    model.eval()
    return model


def cut_to(source: Path, output: Path, selector: str, value: Any, **options: Any):
    """Cuts by a selector that has a flag, as `train.truncate` does."""
    if selector == "ranks":
        value = selecting.read_rank_file(value, "--ranks")
    choice = {"name": selector, "args": {"value": value}}
    return checkpoints.truncate_checkpoint(source, output, choice, **options)
