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

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lowrank_jax.active import set_ranks
from lowrank_jax.contents import (
    FORMAT_VERSION,
    at_ranks,
    contents,
    differences,
    flatten,
    model_items,
    read_axes,
)
from lowrank_jax.errors import (
    DamagedCheckpoint,
    ExistingFile,
    MissingFile,
    UserError,
    at,
)
from lowrank_jax.metadata import check_metadata
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.pieces import check_seal, read_arrays, verify_pieces
from lowrank_jax.ranks import Limits, Ranks, check_lower, largest
from lowrank_jax.storage import METADATA_FILE, StepWriter


class Saved(NamedTuple):
    """A checkpoint on disk, read as far as its metadata.

    Args:
      path: Folder of the step.
      metadata: What it says about itself.
    """

    path: Path
    metadata: dict[str, Any]

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @property
    def max_ranks(self) -> dict[str, Any]:
        return self.metadata["max_ranks"]


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
    contents(
        step, model, metadata or {}, items, None
    )  # a bad value leaves no folder behind
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


def open_checkpoint(path: str | Path) -> Saved:
    """Finds a checkpoint and reads its metadata.

    Args:
      path: A step's folder, a folder of steps, or a workdir with a folder
        `checkpoints`; of several steps the latest that is complete.

    Raises:
      MissingFile: There is no (complete) checkpoint.
      UserError: The folder or its metadata is of another kind or another format.
    """
    complete = complete_steps(path)
    if not complete:
        names = sorted(p.name for p in _root(path).iterdir())
        raise MissingFile(
            f"must hold a complete checkpoint of this library, got {path}, which has"
            f" {names}. A save that was cut off leaves a temporary or half-written"
            " folder; use another one."
        )
    try:
        metadata = json.loads((complete[0] / METADATA_FILE).read_bytes())
        version = metadata.get("format_version")
        if version == FORMAT_VERSION or "sha256" in metadata:
            check_seal(metadata)
    except DamagedCheckpoint as error:
        raise _damaged(complete[0], f"metadata: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        text = f"metadata: must be JSON of this library, not another's, got {error}."
        raise _damaged(complete[0], text) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"must be of format {FORMAT_VERSION}, got {version} in {complete[0]}. Use"
            f" the library version {metadata.get('library_version')} that wrote it."
        )
    with at(f"checkpoint {complete[0]}"):
        check_metadata(metadata)
    return Saved(complete[0], metadata)


def complete_steps(path: str | Path) -> list[Path]:
    """Finds the checkpoints that were written to their end, the latest first.

    Whether their files are still as they were written, only reading them shows: go on
    with the next one after a `DamagedCheckpoint`.

    Args:
      path: A step's folder, a folder of steps, or a workdir with a folder
        `checkpoints`.

    Raises:
      MissingFile: There is no such folder.
    """
    root = _root(path)
    steps = [p for p in root.iterdir() if p.name.isdigit()]
    candidates = sorted(steps, key=lambda p: -int(p.name)) or [root]
    marks = (METADATA_FILE, "_CHECKPOINT_METADATA")
    return [p for p in candidates if all((p / mark).is_file() for mark in marks)]


def set_aside(step: Path) -> Path:
    """Renames a damaged step's folder, so that the step can be saved again.

    Returns:
      The new path, `STEP.damaged` or, if that is there, `STEP.damaged.1` and so on.
    """
    names = (f".{n}" * bool(n) for n in itertools.count())
    paths = (step.with_name(f"{step.name}.damaged{name}") for name in names)
    return step.rename(next(path for path in paths if not path.exists()))


def verify(saved: Saved) -> None:
    """Reads a whole checkpoint.

    Raises:
      DamagedCheckpoint: A file is not as it was written.
    """
    try:
        for name, leaves in saved.metadata["arrays"].items():
            if any(math.prod(shape) for shape, _ in leaves.values()):
                verify_pieces(saved.path / name)
    except DamagedCheckpoint as error:
        raise _damaged(saved.path, str(error)) from error


def _root(path: str | Path) -> Path:
    """The folder of steps, or of one step."""
    root = Path(path).absolute()
    if not os.path.isdir(root):  # of a name that is too long as well
        raise MissingFile(
            f"must be a folder with a checkpoint, got {path}, which is not"
            " there. Check the path."
        )
    return root / "checkpoints" if (root / "checkpoints").is_dir() else root


def _damaged(step: Path, text: str) -> DamagedCheckpoint:
    """The error for a step, with the checkpoint to use in its place."""
    older = [
        path
        for path in (complete_steps(step.parent) if step.name.isdigit() else [])
        if path.name.isdigit() and int(path.name) < int(step.name)
    ]
    use = f"Use the one before it, {older[0]}." if older else "Use another checkpoint."
    return DamagedCheckpoint(f"checkpoint {step}: {text} {use}")


def load(saved: Saved, model: nnx.Module, *, ranks: Ranks | None = None) -> nnx.Module:
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
    layers = find_factors(model)
    if set(saved.max_ranks) != set(layers):
        raise UserError(
            f"checkpoint {saved.path}: low-rank layers must be {sorted(layers)}, as in"
            f" the model, got {sorted(saved.max_ranks)}. Load it with the config it was"
            " trained with."
        )
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
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    template = at_ranks(model, nnx.as_pure(params), allocated)
    items = {"params": template, "model_state": model_items(model)["model_state"]}
    restored = restore(saved, items)
    model = nnx.merge(graphdef, restored["params"], rest, copy=True)
    nnx.update(model, restored["model_state"])
    if ranks is None:
        set_ranks(model, active)
    else:  # what is allocated fits already; a stack of different ranks gets its zeros
        for path, factors in find_factors(model).items():
            factors.cut(active[path])
    return model


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
    arrays, problem = {}, None
    try:
        for name, leaves in templates.items():
            arrays[name] = read_arrays(saved.path / name, leaves)
    except DamagedCheckpoint as error:
        problem = _damaged(saved.path, str(error))
    except OSError as error:
        problem = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array([problem is not None]))
        if problem is None and failed.any():
            others = np.flatnonzero(failed).tolist()
            text = f"must be readable, got errors on processes {others}."
            problem = _damaged(saved.path, text)
    if problem is not None:
        raise problem
    return arrays
