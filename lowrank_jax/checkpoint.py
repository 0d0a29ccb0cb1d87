"""Checkpoints that know their ranks: save, read what they hold, load at any lower rank.

The only file that knows orbax. A checkpoint folder holds one folder per step, each with

- `params`, `model_state`, and whatever else was saved (`opt_state`, `sampler`): arrays,
each
  under its `"/"`-joined path; factors are chunked along the rank axis, so that loading
  at a lower rank reads little more than what it keeps;
- `metadata`: JSON with the format version, the active and allocated ranks, the rules
  that make the structure from the dense model, every array's shape and dtype, the step,
  the library's version, and what the caller adds (the config).

Nothing in it is executed: arrays are arrays, metadata is JSON. Arrays without elements
(rank 0) stand in the metadata alone, since orbax cannot store them.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import ExistingFile, MissingFile, UserError
from lowrank_jax.factorization import rules_of
from lowrank_jax.factors import Rank
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.ranks import Limits, Ranks, check_lower, flatten_rank, largest

FORMAT_VERSION = 1
_RANK_AXES = {"u": (-1,), "s": (-1,), "v": (-2,), "middle": (-2, -1)}
_CHUNKED_BYTES = 16 * 1024  # smaller arrays are one chunk


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
    """Saves steps into one folder, in the background, keeping the last few.

    Args:
      directory: Folder for the steps; made if missing.
      keep: How many of the latest steps to keep, None for all.
    """

    def __init__(self, directory: str | Path, *, keep: int | None = None):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def save(
        self,
        step: int,
        model: nnx.Module,
        metadata: Mapping[str, Any],
        items: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a model and further trees of arrays; returns before they are written.

        Args:
          step: Number of the step.
          model: The model; its ranks go into the metadata.
          metadata: JSON values to add, such as the config.
          items: Further trees by name, such as the optimizer state.
        """
        flat, about = _contents(step, model, metadata, items)
        args = {
            name: _save_args({k: x for k, x in leaves.items() if np.size(x)})
            for name, leaves in flat.items()
            if any(np.size(x) for x in leaves.values())
        }
        args["metadata"] = ocp.args.JsonSave(about)
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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
      FileExistsError: The folder is there already.
    """
    check_new_folder(directory)
    _contents(step, model, metadata or {}, items)  # a bad value leaves no folder behind
    writer = CheckpointWriter(directory)
    writer.save(step, model, metadata or {}, items)
    writer.close()


def check_new_folder(directory: str | Path, *, flag: str = "directory") -> None:
    """Raises FileExistsError where an output folder exists already."""
    if Path(directory).exists():
        raise ExistingFile(
            f"{flag}: must not exist yet, got {directory}. Nothing is overwritten;"
            " name a new folder, or move this one away."
        )


def open_checkpoint(path: str | Path, *, flag: str = "checkpoint") -> Saved:
    """Finds a checkpoint and reads its metadata.

    Args:
      path: A step's folder, a folder of steps, or a workdir with a folder
        `checkpoints`; of several steps the latest that is complete.
      flag: What to call the argument in errors.

    Raises:
      FileNotFoundError: There is no (complete) checkpoint.
      ValueError: The folder or its metadata is of another kind or a newer format.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise MissingFile(
            f"{flag}: must be a folder with a checkpoint, got {path}, which is not"
            " there."
            " Check the path."
        )
    if (root / "checkpoints").is_dir():
        root = root / "checkpoints"
    steps = [p for p in root.iterdir() if p.name.isdigit()]
    candidates = sorted(steps, key=lambda p: -int(p.name)) or [root]
    complete = [p for p in candidates if (p / "metadata" / "metadata").is_file()]
    complete = [p for p in complete if (p / "_CHECKPOINT_METADATA").is_file()]
    if not complete:
        raise MissingFile(
            f"{flag}: must hold a complete checkpoint of this library, got {path},"
            " which"
            f" has {sorted(p.name for p in root.iterdir())}. A save that was cut off"
            " leaves a temporary or half-written folder; use another step or workdir."
        )
    try:
        text = (complete[0] / "metadata" / "metadata").read_text()
        metadata = json.loads(text)
        version = metadata["format_version"]
        missing = {"step", "ranks", "max_ranks", "arrays"} - set(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{flag}: metadata must be JSON of this library, got {complete[0]}"
            f" ({error!r}). The file is damaged, or from another program."
        ) from error
    if version != FORMAT_VERSION or missing:
        raise UserError(
            f"{flag}: must be of format {FORMAT_VERSION}, got {version} in"
            f" {complete[0]}"
            f" (missing: {sorted(missing)}). Use the library version"
            f" {metadata.get('library_version')} that wrote it."
        )
    return Saved(complete[0], metadata)


def load(saved: Saved, model: nnx.Module, *, ranks: Ranks | None = None) -> nnx.Module:
    """The model with the checkpoint's arrays, at its ranks or at lower ones.

    Reads little more than the columns that are kept.

    Args:
      saved: An opened checkpoint.
      model: The model's structure, abstract (`nnx.eval_shape`; random keys then stay
        abstract) or not, factorized by the same rules; its own ranks and values do not
        matter.
      ranks: Ranks to cut to; layers that are not named keep the checkpoint's. None
        keeps the active ranks too.

    Raises:
      ValueError: The checkpoint is of another model (all differences are named), or a
        rank is out of bounds.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    allocated = saved.max_ranks
    factors = find_factors(model)
    if set(allocated) != set(factors):
        raise UserError(
            f"checkpoint {saved.path}: low-rank layers must be {sorted(factors)}, as in"
            f" the model, got {sorted(allocated)}. Load it with the config it was"
            " trained with."
        )
    active = saved.metadata["ranks"]
    if ranks is not None:
        active = {**active, **_check_against(saved, ranks, find_aliases(model))}
        allocated = active
    template = _at_ranks(nnx.as_pure(params), allocated)
    items = {"params": template, "model_state": model_items(model)["model_state"]}
    restored = restore(saved, items)
    model = nnx.merge(graphdef, restored["params"], rest, copy=True)
    nnx.update(model, restored["model_state"])
    set_ranks(model, active)
    return model


def restore(saved: Saved, items: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of arrays from a checkpoint, each in the shape of its template.

    A template may be smaller than what is stored along the rank axis of factors, and
    only there.

    Args:
      saved: An opened checkpoint.
      items: Templates by name: trees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: Names, dtypes or other axes differ; all differences are named.
    """
    flat = {name: flatten(tree) for name, tree in items.items()}
    problems = [
        problem
        for name, leaves in flat.items()
        for problem in _differences(name, leaves, saved.metadata["arrays"])
    ]
    if problems:
        raise UserError(
            f"checkpoint {saved.path}: must be of this model, got one that differs:\n  "
            + "\n  ".join(problems)
            + "\nLoad it with the config it was trained with."
        )
    return {
        name: _read(saved.path / name, tree, flat[name]) for name, tree in items.items()
    }


def model_items(model: nnx.Module) -> dict[str, Any]:
    """A model's arrays as two trees: parameters, and the rest but ranks and random
    keys."""
    _, params, _, state = nnx.split(model, nnx.Param, (Rank, nnx.RngState), ...)
    return {"params": nnx.as_pure(params), "model_state": nnx.as_pure(state)}


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by `"/"`-joined path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def _contents(
    step: int,
    model: nnx.Module,
    metadata: Mapping[str, Any],
    items: Mapping[str, Any] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What a checkpoint holds: arrays by item and path, and the metadata, checked.

    Raises:
      TypeError: The metadata hold something other than JSON values.
    """
    trees = {**model_items(model), **(items or {})}
    flat = {name: flatten(tree) for name, tree in trees.items()}
    about = {
        **metadata,
        "format_version": FORMAT_VERSION,
        "library_version": importlib.metadata.version("lowrank_jax"),
        "step": step,
        "ranks": get_ranks(model),
        "max_ranks": max_ranks(model),
        "rank_rules": rules_of(model),
        "arrays": {name: _describe(leaves) for name, leaves in flat.items()},
    }
    return flat, json.loads(json.dumps(about))  # a copy: it is written later


def _at_ranks(params: Any, ranks: Ranks) -> Any:
    """Shapes of the parameters with the factors of each layer allocated at these
    ranks."""

    def shape(key_path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        sizes = list(leaf.shape)
        for axis in rank_axes(key):
            path = key.rpartition("factors")[0].removesuffix("/")
            sizes[axis] = max(flatten_rank(ranks[path]), default=0)
        return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

    return jax.tree.map_with_path(shape, params)


def rank_axes(key: str) -> tuple[int, ...]:
    """Which axes (from the end) of the array under this path are the rank."""
    parts = key.split("/")
    return _RANK_AXES.get(parts[-1], ()) if "factors" in parts[-2:-1] else ()


def _check_against(
    saved: Saved, ranks: Ranks, aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The ranks under the first path of each layer, checked against what is stored."""
    named = {aliases.get(path, path): rank for path, rank in ranks.items()}
    active, allocated = saved.metadata["ranks"], saved.max_ranks
    check_lower(named, {p: Limits(active[p], largest(allocated[p])) for p in active})
    return named


def _describe(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [list(x.shape), str(x.dtype)] for key, x in leaves.items()}


def _save_args(leaves: Mapping[str, Any]) -> ocp.args.PyTreeSave:
    def chunks(key: str, leaf: Any) -> ocp.SaveArgs:
        axes = rank_axes(key)
        if not axes or leaf.nbytes < _CHUNKED_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(shard_axes=(leaf.ndim + axes[0],))

    return ocp.args.PyTreeSave(
        dict(leaves), save_args={key: chunks(key, leaf) for key, leaf in leaves.items()}
    )


def _differences(
    name: str, leaves: Mapping[str, Any], arrays: Mapping[str, Any]
) -> list[str]:
    """How a template departs from the stored arrays, other than by lower ranks."""
    stored = arrays.get(name)
    if stored is None:
        return [f"{name}: is not in the checkpoint, which has {sorted(arrays)}"]
    problems = [
        f"{name}/{key}: is not in the checkpoint" for key in leaves - stored.keys()
    ]
    problems += [f"{name}/{key}: is not in the model" for key in stored.keys() - leaves]
    for key in leaves.keys() & stored.keys():
        (shape, dtype), leaf = stored[key], leaves[key]
        wanted = list(leaf.shape)
        fits = len(shape) == len(wanted)
        for axis in rank_axes(key) if fits else ():
            wanted[axis] = max(wanted[axis], shape[axis])
        if not fits or wanted != shape or str(leaf.dtype) != dtype:
            problems.append(
                f"{name}/{key}: is {dtype}{shape} in the checkpoint,"
                f" {leaf.dtype}{list(leaf.shape)} in the model"
            )
    return sorted(problems)


def _read(path: Path, tree: Any, flat: Mapping[str, Any]) -> Any:
    """One tree of arrays; what has no elements is made here."""
    filled = {key: leaf for key, leaf in flat.items() if math.prod(leaf.shape)}
    arrays = {
        key: jnp.zeros(leaf.shape, leaf.dtype)
        for key, leaf in flat.items()
        if key not in filled
    }
    if filled:
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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays.update(
                reader.restore(
                    path,
                    args=ocp.args.PyTreeRestore(
                        template, restore_args=restore_args, partial_restore=True
                    ),
                )
            )
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[key] for key in flat])
