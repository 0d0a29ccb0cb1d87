"""Cuts a checkpoint: `python -m train.truncate --checkpoint=DIR --output=DIR2
--rank=8`.

Exactly one selector says what to keep. Those with one value have a flag of their own
(`--rank`, `--rank_fraction`, `--ranks`, `--energy`, `--params_fraction`,
`--macs_fraction` and more); any, and an import path of your own, goes by name, with a
budget and further arguments: `--select=knapsack --macs=0.3`,
`--select=beam --params=0.5 --select_args='{"width": 3, "steps": 20}'`.
`--family=0.5,0.25,0.125` writes several nested models, `--dry_run` none. A dense
checkpoint is factorized first. Each new checkpoint stands alone. Ends with one line of
JSON: `{"output", "params", "stored", "macs", "ranks"}`, of a family `{"sizes": [...]}`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.truncate")

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.forms import Factors
from lowrank_jax.times import MERGED
from train import binary, checkpoints, exporting, folders, selecting, timing
from train.report import logs

_EXAMPLES = (
    "train.truncate --checkpoint=runs/digits --output=runs/small --rank=8",
    "train.truncate --checkpoint=runs/digits --output=runs/b --select=beam --macs=0.3",
)

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_OUTPUT = flags.DEFINE_string("output", None, "New folder for the cut checkpoint.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Choose ranks, and write no checkpoint.")
_RANKS_FILE = flags.DEFINE_string(
    "ranks_file", None, "File to write the ranks to, as --ranks reads it."
)
_SELECTORS = selecting.define_flags()
_BUDGETS = selecting.define_budget_flags()
_FORM = flags.DEFINE_enum(
    "form",
    None,
    timing.CHOICES,
    "Form of the cut layers: factored can be cut again, gauge is smaller, auto is what"
    " is measured to be fastest, layer by layer. The default is factored; with a budget"
    " of time for one model it is auto.",
)
_BATCH = flags.DEFINE_integer(
    "latency_batch", 1, "Examples in a call whose time is measured.", lower_bound=1
)
_TABLE = flags.DEFINE_string(
    "latency_table",
    None,
    "JSON file of the layers' times on this device, measured where it does not know"
    " them; by default one in ~/.cache/lowrank_jax.",
)
_ANY_DEVICE = flags.DEFINE_bool(
    "any_device", False, "Take a --latency_table of another device."
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "orbax",
    exporting.FORMATS,
    "A checkpoint, or a file for other programs: model.safetensors has the ranks in its"
    " header, model.stablehlo is a program for a batch of any size.",
)
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "Picture of the ranks by layer, and of all that a search has scored (.png, .svg,"
    " .pdf).",
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
        {
            "recalibration_batches": ["recalibrate"],
            "measure": ["family", "max_drop"],
            **dict.fromkeys(("select_args", "params", "macs"), ["select"]),
            **dict.fromkeys(("latency", "latency_ms"), ["select"]),
            **dict.fromkeys(("family", "max_drop", "multiple_of"), ["select"]),
            "any_device": ["latency_table"],
        },
    )
    wanted = selecting.with_budget(selecting.from_flags(_SELECTORS), _BUDGETS)
    one_by_time = wanted.by_time and not wanted.sizes
    form = _FORM.value or (timing.AUTO if one_by_time else Factors.form)
    _check_timing(wanted.by_time, form)
    _check_outputs(wanted.sizes, wanted.by_time)
    with contextlib.ExitStack() as stack:
        if not _DRY_RUN.value:
            with errors.at("--output"):
                folders.check_writable(_OUTPUT.value)
                stack.enter_context(folders.claim(_OUTPUT.value))
        figures = checkpoints.truncate_checkpoint(
            _CHECKPOINT.value,
            None if _DRY_RUN.value else _OUTPUT.value,
            wanted.selector,
            sizes=wanted.sizes,
            max_drop=wanted.max_drop,
            latency_ms=wanted.latency_ms,
            timing=timing.Timing(form, _TABLE.value, _ANY_DEVICE.value, _BATCH.value),
            format=_FORMAT.value,
            recalibration_batches=_RECALIBRATION_BATCHES.value
            if _RECALIBRATE.value
            else 0,
            plot=_PLOT.value,
            data_dir=_DATA_DIR.value,
            allow_imports=_ALLOW.value,
        )
    if _RANKS_FILE.value is not None:
        text = json.dumps(figures["ranks"], indent=1, sort_keys=True)
        folders.write_atomically(_RANKS_FILE.value, text + "\n")
    logs.emit(figures)


def _check_timing(by_time: bool, form: str) -> None:
    """Refuses what measures nothing."""
    if by_time and form == MERGED:
        raise UserError(
            "--form: must be one whose time depends on the rank, got merged with a"
            " budget of time. Use auto."
        )
    idle = [f"--{flag.name}" for flag in (_BATCH, _TABLE) if flag.present]
    if idle and not by_time and form != timing.AUTO:
        raise UserError(
            f"{', '.join(idle)}: acts only where times are measured, got form {form}."
            " Add --latency, --latency_ms, --measure=latency or --form=auto."
        )


def _check_outputs(sizes: Sequence[float], by_time: bool) -> None:
    """Refuses what would be found when the work is done."""
    if (_OUTPUT.value is None) != _DRY_RUN.value:
        raise UserError(
            "--output: must be given, or --dry_run, and not both, got"
            f" {_OUTPUT.value!r} and {_DRY_RUN.value}. Keep one."
        )
    if _DRY_RUN.value and _FORM.value not in (None, Factors.form) and not by_time:
        raise UserError(
            f"--form: acts only where a model is written, got {_FORM.value} with"
            " --dry_run. Drop one."
        )
    unused = {"--format": _FORMAT.value != "orbax", "--recalibrate": _unused_batches()}
    if _DRY_RUN.value and any(unused.values()):
        raise UserError(
            f"{', '.join(name for name in unused if unused[name])}: acts only where a"
            " model is written, got --dry_run. Drop one."
        )
    if _RANKS_FILE.value is not None and sizes:
        raise UserError(
            "--ranks_file: must be of one size, got"
            f" --family={','.join(map(str, sizes))}. Drop it: each folder has its"
            " ranks."
        )
    _check_files()


def _unused_batches() -> bool:
    """Whether BatchNorm would be re-estimated for nothing."""
    return _RECALIBRATE.value and not flags.FLAGS["max_drop"].present


def _check_files() -> None:
    """Refuses files that are there or cannot be, and one place for two things."""
    for flag in (_RANKS_FILE, _PLOT):
        if flag.value is None:
            continue
        path = Path(flag.value)
        if not path.parent.is_dir() or path.exists():
            raise UserError(
                f"--{flag.name}: must be a new file in a folder that is there, got"
                f" {path}. Name another."
            )
        with errors.at(f"--{flag.name}"):
            folders.check_new_file(path)
    places: dict[Path, str] = {}
    for flag in (_OUTPUT, _RANKS_FILE, _PLOT, _TABLE):
        if flag.value is not None:
            other = places.setdefault(Path(flag.value).absolute(), flag.name)
            if other != flag.name:
                raise UserError(
                    f"--{flag.name}: must be another place than --{other}, got"
                    f" {flag.value} for both. Name another."
                )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint"])
    binary.run(_main, examples=_EXAMPLES)
