"""Evaluates a checkpoint: `python -m train.evaluate --checkpoint=DIR`.

The checkpoint says itself what model, ranks and data it is of. Ends with one line of JSON,
`{"accuracy", "loss", "params", "macs", "ranks"}`, or with --rank_fractions a list of them
with `"rank_fraction"`, and then a picture of the frontier.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lowrank_jax import checkpoint, surgery
from train import evaluation, logs, main, plots, state, steps
from train import train as train_lib

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "Which examples."
)
_FRACTIONS = flags.DEFINE_list(
    "rank_fractions", None, "Evaluate at these fractions of the ranks, such as 1,0.5."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data set is, if elsewhere.")
_PLOT = flags.DEFINE_string(
    "plot", None, "PNG of the frontier; frontier.png in the checkpoint's folder if empty."
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str = "test",
    fractions: Sequence[float] | None = None,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> evaluation.Figures | list[evaluation.Figures]:
    """Figures of a checkpoint at its ranks, or at each of some fractions of them.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      split: "train", "validation" or "test".
      fractions: Fractions of the ranks in (0, 1]; None for the ranks as they are.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    saved = checkpoint.open_checkpoint(path, flag="--checkpoint")
    model = state.load_model(saved, allow_imports=list(allow_imports))
    config = config_of(saved, data_dir)
    data = train_lib.load_data(config, allow_imports=list(allow_imports))
    structure, params, model_state = state.split_model(model)
    prepare = steps.normalize(config["data"]["mean"], config["data"]["std"])
    evaluate = evaluation.make_evaluator(structure, prepare)
    cost = state.model_cost(model, data.image_shape)
    ranks = surgery.get_ranks(model)
    batches = functools.partial(
        data.eval_batches, split, config["data"]["eval_batch_size"]
    )
    if fractions is None:
        results = evaluate(params, model_state, ranks, batches())
        return evaluation.figures(results, cost, ranks)
    return evaluation.sweep(
        evaluate, params, model_state, ranks, fractions, batches, cost
    )


def config_of(saved: checkpoint.Saved, data_dir: str | None) -> dict[str, Any]:
    """The config in a checkpoint, with the data set somewhere else if asked for."""
    config = saved.metadata["config"]
    if data_dir is None:
        return config
    return {**config, "data": {**config["data"], "data_dir": data_dir}}


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
            raise ValueError(
                f"--rank_fractions: must be numbers in (0, 1], got {value!r}. Write them"
                " as 1,0.5,0.25."
            )
    return fractions


def _main() -> None:
    fractions = parse_fractions(_FRACTIONS.value) if _FRACTIONS.value else None
    figures = evaluate_checkpoint(
        _CHECKPOINT.value,
        split=_SPLIT.value,
        fractions=fractions,
        data_dir=_DATA_DIR.value,
        allow_imports=_ALLOW.value,
    )
    rows = figures if fractions else [figures]
    headers = ["rank_fraction", "accuracy", "loss", "params", "macs"]
    cells = [[{"rank_fraction": "as saved", **row}[key] for key in headers] for row in rows]
    print(logs.table(headers, cells))
    if fractions:
        picture = Path(_PLOT.value or Path(_CHECKPOINT.value) / "frontier.png")
        plots.plot_frontier({_SPLIT.value: figures}, picture)
        print(f"frontier: {picture}")
    logs.emit(figures)


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    main.run(_main)
