"""From nothing to a nested model at several sizes, and what it is worth, in one
command: `make quickstart`.

`python -m train.quickstart --config=configs/digits_mlp.py` trains on scikit-learn's
digits (embedded, no download), cuts the checkpoint to four sizes, evaluates each from
its own checkpoint, and compares nested models of three seeds with dense ones that are
cut by their SVD and with models of one size alone (`train.baselines`; `--seeds=1` does
without). Draws frontier.png, ranks.png and training.png. Ends with one line of JSON,
`{"rows": [...], "compared": {series: [...]}}`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.quickstart")

import shutil
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lowrank_jax import errors
from train import binary, folders, opening, showing
from train.loop import train_and_evaluate
from train.report import logs

_EXAMPLES = (
    "train.quickstart --config=configs/digits_mlp.py",
    "train.quickstart --config=configs/digits_mlp.py:smoke --workdir=runs/quick",
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to run.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder of the run; an earlier quickstart there goes."
)

_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Seeds of every kind of model; 1 for no baselines.", lower_bound=1
)

_MARK, _MARK_TEXT = "quickstart.txt", "Written by train.quickstart, which clears it.\n"


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
    if marked:
        logs.say(f"replacing the earlier quickstart in {workdir}")
    for name in ("run", *map(showing.folder_of, showing.SIZES), *showing.PICTURES):
        path = workdir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    mark.write_text(_MARK_TEXT)


def quickstart(config: Any, workdir: Path, *, seeds: int = 1) -> dict[str, Any]:
    """Trains, cuts, evaluates, compares, prints and draws.

    Args:
      config: As in `configs/`.
      workdir: A folder that `clear` has cleared.
      seeds: As of `showing.show`.

    Returns:
      "rows", the figures of each size from its own checkpoint, and "compared", those of
      each seed and size by series.
    """
    run = workdir / "run"
    train_and_evaluate(config, run)
    rows = showing.cut(run, workdir)
    compared = showing.show(opening.open_model(run), rows, workdir, seeds=seeds)
    for name in showing.PICTURES:
        print(f"picture: {workdir / name}")
    return {"rows": rows, "compared": compared}


def _main() -> None:
    workdir = Path(_WORKDIR.value)
    with errors.at("--workdir"):
        clear(workdir)
    logs.emit(quickstart(_CONFIG.value, workdir, seeds=_SEEDS.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    binary.run(_main, examples=_EXAMPLES)
