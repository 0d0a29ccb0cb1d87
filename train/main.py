"""Trains a config: `python -m train.main --config=configs/X.py --workdir=DIR`.

Ends with one line of JSON: `{"workdir", "step", "frontier": [...]}`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.main")

from absl import flags
from ml_collections import config_flags

from lowrank_jax.errors import UserError
from train import binary, distributed, loop
from train.report import logs, trackers

_EXAMPLES = (
    "train.main --config=configs/digits_mlp.py --workdir=runs/digits",
    "train.main --config=configs/nested.py:smoke --workdir=runs/nested --config.seed=1",
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with :argument after it (such as :smoke)."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same command goes on with a stopped run."
)
_WANDB = flags.DEFINE_string(
    "wandb", None, "Project of Weights & Biases that gets the metrics, too."
)
_PROCESSES = distributed.define_flags()


def _main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir: must name a folder, got ''. Name one.")
    _PROCESSES.connect()
    further = [trackers.wandb(_WANDB.value)] if _WANDB.value else []
    result = loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value, further=further)
    if distributed.is_first():
        logs.emit({"workdir": _WORKDIR.value, **result})


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    binary.run(_main, examples=_EXAMPLES)
