"""From nothing to three model sizes in one command: `make quickstart`.

`python -m train.quickstart --config=configs/digits_mlp.py` trains on scikit-learn's
digits (embedded, no download), cuts the checkpoint at three budgets, evaluates each
from its own checkpoint, prints the table and draws the frontier. Ends with one line of
JSON holding the rows.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.quickstart")

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lowrank_jax import errors
from lowrank_jax.ranks import flatten_rank
from train import binary, checkpoints, folders, opening
from train.loop import train_and_evaluate
from train.report import logs, plots

_EXAMPLES = (
    "train.quickstart --config=configs/digits_mlp.py",
    "train.quickstart --config=configs/digits_mlp.py:smoke --workdir=runs/quick",
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to run.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder of the run; an earlier quickstart there goes."
)

BUDGETS = (0.5, 0.35, 0.25)
"""Shares of the factored layers' dense parameters."""
FRACTIONS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.125)

_MARK, _MARK_TEXT = "quickstart.txt", "Written by train.quickstart, which clears it.\n"
_PICTURE = "frontier.png"


def _cut_name(budget: float) -> str:
    return f"params_{budget}"


def clear(workdir: Path) -> None:
    """Removes what an earlier quickstart wrote, and nothing else; leaves a mark.

    Raises:
      UserError: The folder holds something and not the mark, or cannot be written.
    """
    folders.check_writable(workdir)
    mark = workdir / _MARK
    marked = mark.is_file() and mark.read_bytes() == _MARK_TEXT.encode()
    if workdir.exists() and any(workdir.iterdir()) and not marked:
        raise errors.UserError(
            f"must be new or of an earlier quickstart, got {workdir}, which holds other"
            " files. Nothing is overwritten; name another."
        )
    for name in ("run", *map(_cut_name, BUDGETS), _PICTURE):
        path = workdir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    mark.write_text(_MARK_TEXT)


def _report(
    opened: opening.Opened,
    rows: Sequence[dict[str, Any]],
    curve: Sequence[dict[str, Any]],
    picture: Path,
) -> None:
    """Prints the table and draws the picture."""
    task = opened.run.task
    headline = task.headline
    plots.plot_frontier(
        {"any rank fraction": curve, "cut checkpoints": rows},
        picture,
        headline=headline,
        higher_is_better=task.higher_is_better,
        unit=task.unit,
    )
    shown = [headline, "bleu"] if "bleu" in rows[0] else [headline]
    headers = ["size", *shown, "params", "macs", "ranks"]
    cells = [
        [_span(row[k]) if k == "ranks" else row[k] for k in headers] for row in rows
    ]
    print(f"\nTest {headline} of one trained model, cut at budgets of parameters:\n")
    print(logs.table(headers, cells))
    print(f"\nfrontier: {picture}")


def _span(ranks: Mapping[str, Any]) -> str:
    """The lowest and the highest of all layers' ranks."""
    numbers = [n for rank in ranks.values() for n in flatten_rank(rank)]
    lowest, highest = min(numbers), max(numbers)
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"


def quickstart(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """Trains, cuts, evaluates, prints and draws; returns the figures of each size.

    Args:
      config: As in `configs/`.
      workdir: A folder that `clear` has cleared.
    """
    run = workdir / "run"
    train_and_evaluate(config, run)
    whole = opening.open_model(run)
    rows = [{"size": "full", **whole.figures()}]
    for budget in BUDGETS:
        output = workdir / _cut_name(budget)
        selector = {"name": "params_fraction", "args": {"value": budget}}
        checkpoints.truncate_checkpoint(run, output, selector)
        figures = opening.open_model(output).figures()
        rows.append({"size": f"{budget:g}", **figures})
    curve = whole.sweep(FRACTIONS, translate=False)
    _report(whole, rows, curve, workdir / _PICTURE)
    return rows


def _main() -> None:
    workdir = Path(_WORKDIR.value)
    with errors.at("--workdir"):
        clear(workdir)
    logs.emit({"rows": quickstart(_CONFIG.value, workdir)})


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    binary.run(_main, examples=_EXAMPLES)
