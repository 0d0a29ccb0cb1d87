"""Writes a cut model in the form of a file of other programs, and reads it back."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from lowrank_jax import checkpoint, export
from lowrank_jax.errors import UserError
from train.tasks.base import Task

FORMATS = ("orbax", "safetensors", "stablehlo")
_TOLERANCE = 1e-5  # of a program's outputs, relative to the largest


def check_format(name: str, task: Task) -> None:
    """Refuses a format that a model cannot have, before anything is read.

    Raises:
      UserError: A program of a model that is not run on whole examples.
    """
    if name == "stablehlo" and task.unit != "example":
        raise UserError(
            "--format: stablehlo must be of a model that runs on whole examples, got"
            f" one that is counted by the {task.unit}. Use safetensors."
        )


def save(
    output: str | Path,
    model: nnx.Module,
    task: Task,
    *,
    name: str,
    step: int,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a new folder, all or nothing: a checkpoint, or a file `model.NAME`.

    A file is read back and compared before the folder has its name.

    Args:
      output: The folder.
      model: The model.
      task: What it is for.
      name: One of `FORMATS`.
      step: Of its training.
      metadata: What a checkpoint says of it.

    Raises:
      OSError: It could not be written.
    """
    if name == "orbax":
        checkpoint.save(output, model, step=step, metadata=metadata)
        return
    folder = Path(output)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True)
    try:
        path = partial / f"model.{name}"
        if name == "safetensors":
            export.save_safetensors(path, model, metadata=metadata)
            _compare_arrays(export.load_safetensors(path, model), model)
        else:
            path.write_bytes(export.to_stablehlo(model, *task.example))
            _compare_outputs(path.read_bytes(), model, task)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compare_arrays(read: nnx.Module, written: nnx.Module) -> None:
    items = map(checkpoint.model_items, (read, written))
    ours, theirs = map(checkpoint.flatten, items)
    for key, array in ours.items():
        if not np.array_equal(array, theirs[key]):
            raise OSError(f"safetensors: {key} is not as it was written")


def _compare_outputs(program: bytes, model: nnx.Module, task: Task) -> None:
    """On two examples of ones."""
    inputs = [np.ones((2, *one.shape[1:]), one.dtype) for one in task.example]
    model.eval()
    found, expected = export.from_stablehlo(program)(*inputs), model(*inputs)
    difference = np.abs(np.asarray(found) - np.asarray(expected)).max()
    if not difference <= _TOLERANCE * max(np.abs(np.asarray(expected)).max(), 1.0):
        raise RuntimeError(f"stablehlo: the program is off by {difference}")
