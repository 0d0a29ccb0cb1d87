"""Cuts a checkpoint: `python -m train.truncate --checkpoint=DIR --output=DIR2
--rank=8`.

Exactly one selector says what to keep. Those with one value have a flag of their own
(`--rank`, `--rank_fraction`, `--ranks`, `--energy`, `--params_fraction`,
`--macs_fraction`); any, and an import path of your own, goes by name and arguments:
`--select=beam --select_args='{"measure": "macs", "fraction": 0.5, ...}'`. The new
checkpoint stands alone. Ends with one line of JSON: `{"output", "params", "macs",
"ranks"}`.
"""

import contextlib

from absl import flags

from lowrank_jax import errors
from lowrank_jax.forms import FORMS, Factors
from train import binary, checkpoints, folders, selecting
from train.report import logs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_OUTPUT = flags.DEFINE_string("output", None, "New folder for the cut checkpoint.")
_SELECTORS = selecting.define_flags()
_FORM = flags.DEFINE_enum(
    "form",
    Factors.form,
    sorted(FORMS),
    "Form of the cut layers: factored can be cut again, gauge is smaller.",
)
_RECALIBRATE = flags.DEFINE_bool(
    "recalibrate", False, "Re-estimate BatchNorm on training data."
)
_RECALIBRATION_BATCHES = flags.DEFINE_integer(
    "recalibration_batches",
    50,
    "How many training batches to do it on.",
    lower_bound=1,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data set is, if elsewhere."
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def _main() -> None:
    binary.check_companions(
        flags.FLAGS,
        {"recalibration_batches": ["recalibrate"], "select_args": ["select"]},
    )
    selector = selecting.from_flags(_SELECTORS)
    with contextlib.ExitStack() as stack:
        with errors.at("--output"):
            folders.check_writable(_OUTPUT.value)
            stack.enter_context(folders.claim(_OUTPUT.value))
        logs.emit(
            checkpoints.truncate_checkpoint(
                _CHECKPOINT.value,
                _OUTPUT.value,
                selector,
                form=_FORM.value,
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
