"""Checkpoints that know their ranks: save, read what they hold, load at any lower rank.

A checkpoint folder holds one folder per step, named by its number, each with

- `params`, `model_state`, and whatever else was saved (`opt_state`, `sampler`): arrays,
  each under its `"/"`-joined path, in `process_I.bin` and `process_I.json` for each
  process I that wrote (`pieces` says what is in them). Factors are written column by
  column of their rank, with a checksum for every few, so that loading at a lower rank
  reads at most 1.125 times what it keeps. Arrays without elements are in the metadata
  alone;
- `metadata/metadata`: JSON with the format version, the active and allocated ranks, the
  rules that make the structure from the dense model, every array's shape and dtype, the
  rank axes of those that have some, the step, its figure, the library's version, what
  the caller adds (the config), and `sha256`, the digest of all the others;
- `_CHECKPOINT_METADATA` and `commit_success.txt`, which say that the step is complete.

A step that is being written is a folder `STEP.orbax-checkpoint-tmp`. Nothing in a
checkpoint is executed, and no array is returned whose bytes differ from what was saved.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lowrank_jax.active import set_ranks
from lowrank_jax.contents import (
    at_ranks,
    contents,
    differences,
    flatten,
    model_items,
    read_axes,
)
from lowrank_jax.errors import DamagedCheckpoint, ExistingFile, UserError, at
from lowrank_jax.factors import Factors
from lowrank_jax.nnx_internals import split
from lowrank_jax.paths import Model, find_aliases, find_factors, walk
from lowrank_jax.pieces import read_arrays
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    check_lower,
    flatten_rank,
    largest,
    name_of,
)
from lowrank_jax.steps import (
    Saved,
    complete_steps,
    damaged_step,
    open_checkpoint,
    part_of,
    set_aside,
    verify,
)

__all__ = [
    "CheckpointWriter",
    "Saved",
    "check_new_folder",
    "complete_steps",
    "flatten",
    "load",
    "load_layer",
    "model_items",
    "open_checkpoint",
    "restore",
    "save",
    "set_aside",
    "verify",
]


class CheckpointWriter:
    """Saves steps into one folder, in the background, keeping the last and the best.

    Every process makes one and calls it at the same steps; each writes what its devices
    hold. An older step is deleted when the newer one is complete on disk.

    Args:
      directory: Folder for the steps; made if missing. What a save that was cut off
        left there is removed.
      keep: How many of the latest steps to keep, None for all.
      keep_best: How many of the steps with the best figures to keep beside them.
      higher_is_better: Which figures are the best.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        keep_best: int = 0,
        higher_is_better: bool = True,
    ):
        # brings orbax, a quarter of the time of the library's import
        from lowrank_jax.storage import StepWriter

        self._directory = Path(directory)
        self._writer = StepWriter(
            directory,
            keep=keep,
            keep_best=keep_best,
            higher_is_better=higher_is_better,
        )

    def save(
        self,
        step: int,
        model: nnx.Module,
        metadata: Mapping[str, Any],
        items: Mapping[str, Any] | None = None,
        *,
        figure: float | None = None,
    ) -> None:
        """Saves a model and further trees of arrays; returns before they are written.

        What is given may be donated at once.

        Args:
          step: Number of the step.
          model: The model; its ranks go into the metadata.
          metadata: JSON values to add, such as the config.
          items: Further trees by name, such as the optimizer state.
          figure: How good the model is; NaN and None are never the best.

        Raises:
          ExistingFile: The step is there.
          OSError: This save, or the one before it, could not be written.
          UserError: Two arrays have one path.
        """
        if step in self._writer.steps():
            raise ExistingFile(
                f"checkpoint {self._directory / str(step)}: must not exist yet, got a"
                " second save of the step. Move the folder away."
            )
        flat, about = contents(step, model, metadata, items, figure)
        self._writer.write(step, flat, read_axes(flat, about), about)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: It could not be written.
        """
        self._writer.wait()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._writer.close()


def save(
    directory: str | Path,
    model: nnx.Module,
    *,
    step: int = 0,
    metadata: Mapping[str, Any] | None = None,
    items: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that stands alone into a folder of its own.

    Raises:
      ExistingFile: The folder is there already.
    """
    check_new_folder(directory)
    # a bad value leaves no folder behind
    contents(step, model, metadata or {}, items, None)
    writer = CheckpointWriter(directory)
    writer.save(step, model, metadata or {}, items)
    writer.close()


def check_new_folder(directory: str | Path) -> None:
    """Raises FileExistsError where an output folder exists already."""
    if Path(directory).exists():
        raise ExistingFile(
            f"must not exist yet, got {directory}. Nothing is overwritten;"
            " name a new folder, or move this one away."
        )


def load(saved: Saved, model: Model, *, ranks: Ranks | None = None) -> Model:
    """Returns the model with the checkpoint's arrays, at its ranks or at lower ones.

    Reads little more than the columns that are kept. Each parameter gets the sharding
    of the given model's, less the axes that no longer divide.

    Args:
      saved: An opened checkpoint.
      model: The model's structure, abstract (`nnx.eval_shape`; random keys then stay
        abstract) or not, factorized by the same rules; its own ranks and values do not
        matter.
      ranks: Ranks to cut to, up to the active ones of the checkpoint; layers that are
        not named are cut to these. None keeps allocated and active ranks alike.

    Raises:
      DamagedCheckpoint: A file is not as it was written.
      UserError: The checkpoint is of another model (all differences are named), or a
        rank is out of bounds.
    """
    layers = _check_layers(saved, model)
    active, allocated = saved.metadata["ranks"], saved.max_ranks
    if ranks is not None:
        aliases = find_aliases(model)
        named = {aliases.get(path, path): rank for path, rank in ranks.items()}
        check_lower(
            named,
            {
                path: Limits(active[path], largest(allocated[path]), layer.nested)
                for path, layer in layers.items()
            },
        )
        active = allocated = {**active, **named}
    graphdef, params, rest = split(model, nnx.Param, ...)
    template = at_ranks(model, nnx.as_pure(params), allocated)
    items = {"params": template, "model_state": model_items(model)["model_state"]}
    restored = restore(saved, items)
    model = nnx.merge(graphdef, restored["params"], rest, copy=True)
    nnx.update(model, restored["model_state"])
    set_ranks(model, active)
    if ranks is not None:  # a stack of different ranks gets its zeros
        for path, factors in find_factors(model).items():
            if min(flatten_rank(active[path]), default=0) < factors.max_rank:
                factors.zero_masked()
    return model


def load_layer(saved: Saved, model: nnx.Module, path: str) -> Factors:
    """Returns the factors of one layer as `load` does, at their own ranks; reads no
    others.

    Args:
      saved: An opened checkpoint.
      model: As for `load`.
      path: As of `find_factors`.

    Raises:
      DamagedCheckpoint: As `load`.
      UserError: As `load`.
    """
    factors = _check_layers(saved, model)[path]
    places = [place for place, node in walk(model) if node is factors]
    with at(name_of(path)):
        return load(part_of(saved, path, places), factors)


def _check_layers(saved: Saved, model: nnx.Module) -> dict[str, Factors]:
    """Returns the model's factors, which are those of the checkpoint."""
    layers = find_factors(model)
    if set(saved.max_ranks) != set(layers):
        raise UserError(
            f"checkpoint {saved.path}: low-rank layers must be {sorted(layers)}, as in"
            f" the model, got {sorted(saved.max_ranks)}. Load it with the config it was"
            " trained with."
        )
    return layers


def restore(saved: Saved, items: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of arrays from a checkpoint, each in the shape of its template.

    A template may be smaller than what is stored along the rank axis of factors, and
    only there. Each array gets the sharding of its template, whatever it was saved
    under; every process calls this, and reads what its own devices need.

    Args:
      saved: An opened checkpoint.
      items: Templates by name: trees of arrays or `jax.ShapeDtypeStruct`. Those without
        a sharding go to the first device of each process.

    Raises:
      DamagedCheckpoint: A file is not as it was written (on any process).
      UserError: Names, dtypes or other axes differ; all differences are named.
    """
    flat = {name: flatten(tree) for name, tree in items.items()}
    problems = [
        problem
        for name, leaves in flat.items()
        for problem in differences(name, leaves, saved.metadata)
    ]
    if problems:
        raise UserError(
            f"checkpoint {saved.path}: must be of this model, got one that differs:\n  "
            + "\n  ".join(problems)
            + "\nLoad it with the config it was trained with."
        )
    arrays = _read_together(saved, flat)
    return {
        name: jax.tree.unflatten(
            jax.tree.structure(tree), [arrays[name][key] for key in flat[name]]
        )
        for name, tree in items.items()
    }


def _read_together(
    saved: Saved, templates: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, jax.Array]]:
    """Reads items by name; damage that one process sees is an error on all of them."""
    arrays: dict[str, dict[str, jax.Array]] = {}
    problem: Exception | None = None
    try:
        for name, leaves in templates.items():
            full = {saved.prefix + key: leaf for key, leaf in leaves.items()}
            found = read_arrays(saved.path / name, full)
            arrays[name] = {key: found[saved.prefix + key] for key in leaves}
    except DamagedCheckpoint as error:
        problem = damaged_step(saved.path, str(error))
    except OSError as error:
        problem = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array([problem is not None]))
        if problem is None and failed.any():
            others = np.flatnonzero(failed).tolist()
            text = f"must be readable, got errors on processes {others}."
            problem = damaged_step(saved.path, text)
    if problem is not None:
        raise problem
    return arrays
