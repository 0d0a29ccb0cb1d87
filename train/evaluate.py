"""Evaluates a checkpoint: `python -m train.evaluate --checkpoint=DIR`.

The checkpoint says itself what model, ranks and data it is of. Ends with one line of
JSON, the task's figures with `"params"` (each layer in the smaller of its forms),
`"stored"` (parameters in the checkpoint), `"macs"` and `"ranks"`, or with
--rank_fractions a list of them with `"rank_fraction"`, and then a picture of the
frontier. Where the task translates, all sentences of the split are translated greedily
and `"bleu"` is among the figures (`--nobleu` spares the time).
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.evaluate")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import binary, folders, opening, translating
from train.report import logs, plots, tables

_EXAMPLES = (
    "train.evaluate --checkpoint=runs/digits",
    "train.evaluate --checkpoint=runs/digits --rank_fractions=1,0.5,0.25",
)

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "Which examples."
)
_FRACTIONS = flags.DEFINE_list(
    "rank_fractions", None, "Evaluate at these fractions of the ranks, such as 1,0.5."
)
_RECALIBRATION_BATCHES = flags.DEFINE_integer(
    "recalibration_batches",
    None,
    "With --rank_fractions: training batches to re-estimate BatchNorm on at each; as"
    " many as the run's own evaluations took if not given.",
    lower_bound=0,
)
_BLEU = flags.DEFINE_bool(
    "bleu",
    None,
    "Translate the split and count BLEU; yes if not given, where the task translates.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data set is, if elsewhere."
)
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "With --rank_fractions: picture of the frontier (.png, .svg, .pdf); frontier.png in"
    " the checkpoint's folder if not given.",
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def parse_fractions(values: Sequence[str]) -> list[float]:
    """Returns the fractions that a flag gives.

    Raises:
      UserError: One is not a number in (0, 1].
    """
    fractions = []
    for value in values:
        try:
            fractions.append(float(value))
        except ValueError:
            fractions.append(0.0)
        if not 0 < fractions[-1] <= 1:
            raise UserError(
                f"--rank_fractions: must be numbers in (0, 1], got {value!r}. Write"
                " them as 1,0.5,0.25."
            )
    return fractions


def _main() -> None:
    binary.check_companions(
        flags.FLAGS,
        {"recalibration_batches": ["rank_fractions"], "plot": ["rank_fractions"]},
    )
    fractions = parse_fractions(_FRACTIONS.value or [])
    picture = Path(_PLOT.value or Path(_CHECKPOINT.value) / "frontier.png")
    if fractions:
        with errors.at("--plot"):
            plots.check_suffix(picture)
            folders.check_new_file(picture)
    opened = opening.open_model(
        _CHECKPOINT.value, data_dir=_DATA_DIR.value, allow_imports=_ALLOW.value
    )
    task = opened.run.task
    _check_bleu(opened)
    translate = _BLEU.value is not False
    if not fractions:
        figures = opened.figures(_SPLIT.value, translate=translate)
        print(_table(opened, [{"rank_fraction": "as saved", **figures}]))
        logs.emit(figures)
        return
    batches = _RECALIBRATION_BATCHES.value
    if batches is None:
        batches = opened.run.config["recalibration_batches"]
    with errors.at("--rank_fractions"):
        rows = opened.sweep(
            fractions,
            _SPLIT.value,
            recalibration_batches=batches,
            translate=translate,
        )
    print(_table(opened, rows))
    plots.plot_frontier(
        {_SPLIT.value: rows},
        picture,
        headline=task.headline,
        higher_is_better=task.higher_is_better,
        unit=task.unit,
    )
    print(f"frontier: {picture}")
    logs.emit(rows)


def _check_bleu(opened: opening.Opened) -> None:
    task = opened.run.task
    if _BLEU.value and not translating.translates(task):
        raise UserError(
            "--bleu: must be of a task that translates, on data with a tokenizer, got"
            f" another, judged by {task.headline}. Drop it."
        )


def _table(opened: opening.Opened, rows: Sequence[dict[str, Any]]) -> str:
    """The layers of a model, then its figures."""
    task, hidden = opened.run.task, ("rank_fraction", "ranks")
    names = ["rank_fraction", *(name for name in rows[0] if name not in hidden)]
    layers = tables.of_layers(opened.model, task)
    figures = tables.of_figures(rows, names, task)
    return f"{layers}\n\n{_SPLIT.value} split\n{figures}"


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    binary.run(_main, examples=_EXAMPLES)
