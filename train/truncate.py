"""Cuts a checkpoint: `python -m train.truncate --checkpoint=DIR --output=DIR2
--rank=8`.

Exactly one selector says what to keep: --rank, --rank_fraction, --ranks, --energy,
--params_fraction or --macs_fraction. The new checkpoint stands alone and can be cut,
evaluated and trained on again. Ends with one line of JSON: `{"output", "params",
"macs", "ranks"}`.
"""

from absl import flags

from lowrank_jax.errors import UserError
from train import binary, checkpoints
from train.report import logs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_OUTPUT = flags.DEFINE_string("output", None, "New folder for the cut checkpoint.")
_RANK = flags.DEFINE_integer("rank", None, "Every layer at most this rank.")
_FRACTION = flags.DEFINE_float(
    "rank_fraction", None, "This fraction of each layer's rank, rounded up."
)
_RANKS = flags.DEFINE_string("ranks", None, "JSON file {path: rank}.")
_ENERGY = flags.DEFINE_float(
    "energy", None, "Least prefix with this share of the squared column importances."
)
_PARAMS = flags.DEFINE_float(
    "params_fraction", None, "This share of the factored layers' dense parameters."
)
_MACS = flags.DEFINE_float(
    "macs_fraction", None, "This share of the factored layers' dense MACs."
)
_RECALIBRATE = flags.DEFINE_bool(
    "recalibrate", False, "Re-estimate BatchNorm on training data."
)
_RECALIBRATION_BATCHES = flags.DEFINE_integer(
    "recalibration_batches", 50, "How many training batches to do it on."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data set is, if elsewhere."
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def _main() -> None:
    values = dict(
        zip(
            checkpoints.FLAGS,
            (f.value for f in (_RANK, _FRACTION, _RANKS, _ENERGY, _PARAMS, _MACS)),
            strict=True,
        )
    )
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        raise UserError(
            "flags: exactly one of"
            f" {', '.join('--' + s for s in checkpoints.FLAGS)} must be"
            f" given, got {['--' + name for name in given]}. Keep one."
        )
    ((selector, value),) = given.items()
    logs.emit(
        checkpoints.truncate_checkpoint(
            _CHECKPOINT.value,
            _OUTPUT.value,
            selector,
            value,
            recalibration_batches=_RECALIBRATION_BATCHES.value
            if _RECALIBRATE.value
            else 0,
            data_dir=_DATA_DIR.value,
            allow_imports=_ALLOW.value,
        )
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "output"])
    binary.run(_main)
