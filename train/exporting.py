"""Writes a cut model in the form of a file of other programs, and reads it back."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowrank_jax import checkpoint, export
from lowrank_jax.errors import UserError

FORMATS = ("orbax", "safetensors", "stablehlo")
_TOLERANCE = 1e-2  # of a program's outputs, relative; in bfloat16 they are off by 4e-3


def save(
    output: str | Path,
    model: nnx.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
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
      inputs: Its inputs for one example.
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
    shutil.rmtree(partial, ignore_errors=True)  # what a kill left: `output` is claimed
    partial.mkdir(parents=True)
    try:
        path = partial / f"model.{name}"
        if name == "safetensors":
            export.save_safetensors(path, model, metadata=metadata)
            _compare_arrays(export.load_safetensors(path, model), model)
        else:
            program = export.to_stablehlo(model, *inputs)
            with path.open("wb") as file:
                file.write(program)
                file.flush()
                os.fsync(file.fileno())
            _compare_outputs(path.read_bytes(), model, inputs)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compare_arrays(read: nnx.Module, written: nnx.Module) -> None:
    items = map(checkpoint.model_items, (read, written))
    ours, theirs = map(checkpoint.flatten, items)
    for key, array in ours.items():
        if np.asarray(array).tobytes() != np.asarray(theirs[key]).tobytes():
            raise OSError(f"{key}: is not as it was written. Mend the disk.")


def _compare_outputs(
    program: bytes, model: nnx.Module, example: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """On random examples; where numbers are whole, of ones and twos."""
    rng = np.random.default_rng(0)
    inputs = [
        rng.standard_normal((2, *one.shape[1:])).astype(one.dtype)
        if np.issubdtype(one.dtype, np.floating)
        else rng.integers(1, 3, (2, *one.shape[1:])).astype(one.dtype)
        for one in example
    ]
    model.eval()
    found = np.asarray(export.from_stablehlo(program)(*inputs))
    expected = np.asarray(model(*inputs))
    largest = float(np.abs(expected).max(initial=0.0))
    if not np.allclose(found, expected, rtol=0, atol=_TOLERANCE * largest):
        raise UserError(
            "--format: stablehlo must have the model's outputs, got one that is off by"
            f" {np.abs(found - expected).max():.3g}. Report it, and use safetensors."
        )
