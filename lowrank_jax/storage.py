"""Arrays and JSON on disk: the only file that knows orbax.

A step is a folder with one folder for each tree of arrays, given as `{key: array}`, and
one for its metadata. Arrays without elements are not written, since orbax cannot store
them; whoever reads makes them from their shapes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

_CHUNKED_BYTES = 16 * 1024  # smaller arrays are one chunk


class StepWriter:
    """Writes steps into one folder, in the background, keeping the last few.

    Args:
      directory: Folder for the steps; made if missing.
      keep: How many of the latest steps to keep, None for all.
    """

    def __init__(self, directory: str | Path, *, keep: int | None = None):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def write(
        self,
        step: int,
        trees: Mapping[str, Mapping[str, Any]],
        chunk_axes: Mapping[str, Mapping[str, int]],
        metadata: Any,
    ) -> None:
        """Writes one step; returns before all of it is on disk.

        Args:
          step: Its number.
          trees: Arrays by tree and key.
          chunk_axes: Axes (from the end) along which large arrays are chunked, so that
            a prefix can be read alone, by tree and key; the others are one chunk.
          metadata: A JSON value.
        """
        args = {}
        for name, arrays in trees.items():
            filled = {key: x for key, x in arrays.items() if math.prod(x.shape)}
            if filled:
                args[name] = ocp.args.PyTreeSave(
                    filled,
                    save_args={
                        key: _save_args(array, chunk_axes[name].get(key))
                        for key, array in filled.items()
                    },
                )
        args["metadata"] = ocp.args.JsonSave(metadata)
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def read_arrays(path: Path, templates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the arrays of one tree by key, each in the shape of its template.

    A smaller template reads a prefix along each axis; what has no elements is made.

    Args:
      path: Folder of the tree.
      templates: Arrays or `jax.ShapeDtypeStruct`, with a sharding or without.
    """
    arrays = {
        key: jnp.zeros(leaf.shape, leaf.dtype)
        for key, leaf in templates.items()
        if not math.prod(leaf.shape)
    }
    filled = {key: leaf for key, leaf in templates.items() if key not in arrays}
    if not filled:
        return arrays
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restore_args = {
        key: ocp.ArrayRestoreArgs(
            sharding=getattr(leaf, "sharding", None) or device,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
            strict=False,
        )
        for key, leaf in filled.items()
    }
    template = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for key, leaf in filled.items()
    }
    args = ocp.args.PyTreeRestore(
        template, restore_args=restore_args, partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return {**arrays, **reader.restore(path, args=args)}


def _save_args(array: Any, chunk_axis: int | None) -> ocp.SaveArgs:
    if chunk_axis is None or array.nbytes < _CHUNKED_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(shard_axes=(array.ndim + chunk_axis,))
