"""From nothing to three model sizes in one command: `make quickstart`.

`python -m train.quickstart --config=configs/digits_mlp.py` trains on scikit-learn's
digits (embedded, no download), cuts the checkpoint at three budgets, evaluates each
from its own checkpoint, prints the table and draws the frontier. Ends with one line of
JSON holding the rows.
"""

import shutil
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lowrank_jax.errors import UserError
from train import binary, checkpoints
from train.loop import train_and_evaluate
from train.report import logs, plots

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to run.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder of the run; an earlier quickstart there goes."
)

BUDGETS = (0.5, 0.35, 0.25)
"""Shares of the factored layers' dense parameters."""
FRACTIONS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.125)
_MARK = "quickstart"


def _clear(workdir: Path) -> None:
    """Removes an earlier quickstart, and nothing else."""
    if workdir.exists() and not (workdir / _MARK).exists():
        raise UserError(
            f"--workdir: must be new or of an earlier quickstart, got {workdir}."
            " Nothing is overwritten; name another."
        )
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    (workdir / _MARK).touch()


def _main() -> None:
    workdir = Path(_WORKDIR.value)
    _clear(workdir)
    run = workdir / "run"
    train_and_evaluate(_CONFIG.value, run)
    rows = [{"size": "full", **checkpoints.open_model(run).figures()}]
    for budget in BUDGETS:
        output = workdir / f"params_{budget}"
        checkpoints.truncate_checkpoint(
            run, output, {"name": "params_fraction", "args": {"value": budget}}
        )
        rows.append({"size": f"{budget:g}", **checkpoints.open_model(output).figures()})
    curve = checkpoints.open_model(run).sweep(FRACTIONS)
    picture = workdir / "frontier.png"
    plots.plot_frontier({"any rank fraction": curve, "cut checkpoints": rows}, picture)
    headers = ["size", "accuracy", "params", "macs", "ranks"]
    cells = [[str(row[k]) if k == "ranks" else row[k] for k in headers] for row in rows]
    print("\nTest accuracy of one trained model, cut at budgets of parameters:\n")
    print(logs.table(headers, cells))
    print(f"\nfrontier: {picture}")
    logs.emit({"rows": rows})


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    binary.run(_main)
