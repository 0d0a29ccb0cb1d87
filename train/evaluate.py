"""Evaluates a checkpoint: `python -m train.evaluate --checkpoint=DIR`.

The checkpoint says itself what model, ranks and data it is of. Ends with one line of
JSON, `{"accuracy", "loss", "params", "macs", "ranks"}`, or with --rank_fractions a list
of them with `"rank_fraction"`, and then a picture of the frontier.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lowrank_jax.errors import UserError
from train import binary, evaluation
from train.report import logs, plots

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
    0,
    "With --rank_fractions: training batches to re-estimate BatchNorm on at each.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data set is, if elsewhere."
)
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "PNG of the frontier; frontier.png in the checkpoint's folder if empty.",
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def parse_fractions(values: Sequence[str]) -> list[float]:
    """Fractions from a flag.

    Raises:
      ValueError: One is not a number in (0, 1].
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
    fractions = parse_fractions(_FRACTIONS.value) if _FRACTIONS.value else None
    figures = evaluation.evaluate_checkpoint(
        _CHECKPOINT.value,
        split=_SPLIT.value,
        fractions=fractions,
        recalibration_batches=_RECALIBRATION_BATCHES.value,
        data_dir=_DATA_DIR.value,
        allow_imports=_ALLOW.value,
    )
    rows = figures if fractions else [figures]
    headers = ["rank_fraction", "accuracy", "loss", "params", "macs"]
    cells = [
        [{"rank_fraction": "as saved", **row}[key] for key in headers] for row in rows
    ]
    print(logs.table(headers, cells))
    if fractions:
        picture = Path(_PLOT.value or Path(_CHECKPOINT.value) / "frontier.png")
        plots.plot_frontier(
            {_SPLIT.value: figures},
            picture,
            headline="accuracy",
            higher_is_better=True,
        )
        print(f"frontier: {picture}")
    logs.emit(figures)


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    binary.run(_main)
