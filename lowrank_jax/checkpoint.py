"""Checkpoints that know their ranks: save, read what they hold, load at any lower rank.

A checkpoint folder holds one folder per step, each with

- `params`, `model_state`, and whatever else was saved (`opt_state`, `sampler`): arrays,
  each under its `"/"`-joined path; factors are chunked along the rank axis, so that
  loading at a lower rank reads little more than what it keeps;
- `metadata`: JSON with the format version, the active and allocated ranks, the rules
  that make the structure from the dense model, every array's shape and dtype, the rank
  axes of those that have some, the step, the library's version, and what the caller
  adds (the config).

Nothing in it is executed: arrays are arrays, metadata is JSON (`storage`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import ExistingFile, MissingFile, UserError, at
from lowrank_jax.factorization import rules_of
from lowrank_jax.factors import Factors, Rank
from lowrank_jax.metadata import check_metadata
from lowrank_jax.paths import find_aliases, find_factors, walk
from lowrank_jax.ranks import Limits, Ranks, check_lower, largest
from lowrank_jax.storage import StepWriter, read_arrays
from lowrank_jax.version import __version__

FORMAT_VERSION = 2
MODEL_ITEMS = ("params", "model_state")
"""The items that `model_items` makes, whose paths are the model's own."""


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
        self._writer = StepWriter(directory, keep=keep)

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

        Raises:
          UserError: Two arrays have one path.
        """
        flat, about = _contents(step, model, metadata, items)
        chunk_axes = {
            name: {
                key: axes[0] for key in leaves if (axes := _axes_of(name, key, about))
            }
            for name, leaves in flat.items()
        }
        self._writer.write(step, flat, chunk_axes, about)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._writer.wait()

    def close(self) -> None:
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
    _contents(step, model, metadata or {}, items)  # a bad value leaves no folder behind
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
    root = Path(path).absolute()
    if not root.is_dir():
        raise MissingFile(
            f"must be a folder with a checkpoint, got {path}, which is not"
            " there. Check the path."
        )
    if (root / "checkpoints").is_dir():
        root = root / "checkpoints"
    steps = [p for p in root.iterdir() if p.name.isdigit()]
    candidates = sorted(steps, key=lambda p: -int(p.name)) or [root]
    complete = [p for p in candidates if (p / "metadata" / "metadata").is_file()]
    complete = [p for p in complete if (p / "_CHECKPOINT_METADATA").is_file()]
    if not complete:
        raise MissingFile(
            f"must hold a complete checkpoint of this library, got {path},"
            f" which has {sorted(p.name for p in root.iterdir())}. A save that was cut"
            " off leaves a temporary or half-written folder; use another one."
        )
    try:
        text = (complete[0] / "metadata" / "metadata").read_text()
        metadata = json.loads(text)
        version = metadata["format_version"]
        missing = {"step", "ranks", "max_ranks", "rank_axes", "arrays"} - set(metadata)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"metadata must be JSON of this library, got {complete[0]}"
            f" ({error!r}). The file is damaged, or from another program."
        ) from error
    if version != FORMAT_VERSION or missing:
        raise UserError(
            f"must be of format {FORMAT_VERSION}, got {version} in"
            f" {complete[0]} (missing: {sorted(missing)}). Use the library version"
            f" {metadata.get('library_version')} that wrote it."
        )
    with at(f"checkpoint {complete[0]}"):
        check_metadata(metadata)
    return Saved(complete[0], metadata)


def load(saved: Saved, model: nnx.Module, *, ranks: Ranks | None = None) -> nnx.Module:
    """Returns the model with the checkpoint's arrays, at its ranks or at lower ones.

    Reads little more than the columns that are kept.

    Args:
      saved: An opened checkpoint.
      model: The model's structure, abstract (`nnx.eval_shape`; random keys then stay
        abstract) or not, factorized by the same rules; its own ranks and values do not
        matter.
      ranks: Ranks to cut to, up to the active ones of the checkpoint; layers that are
        not named are cut to these. None keeps allocated and active ranks alike.

    Raises:
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
    template = _at_ranks(model, nnx.as_pure(params), allocated)
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
    only there.

    Args:
      saved: An opened checkpoint.
      items: Templates by name: trees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UserError: Names, dtypes or other axes differ; all differences are named.
    """
    flat = {name: flatten(tree) for name, tree in items.items()}
    problems = [
        problem
        for name, leaves in flat.items()
        for problem in _differences(name, leaves, saved.metadata)
    ]
    if problems:
        raise UserError(
            f"checkpoint {saved.path}: must be of this model, got one that differs:\n  "
            + "\n  ".join(problems)
            + "\nLoad it with the config it was trained with."
        )
    restored = {}
    for name, tree in items.items():
        arrays = read_arrays(saved.path / name, flat[name])
        leaves = [arrays[key] for key in flat[name]]
        restored[name] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    return restored


def model_items(model: nnx.Module) -> dict[str, Any]:
    """Returns a model's arrays as two trees: parameters, and the rest.

    Ranks and random keys are left out.
    """
    _, params, _, state = nnx.split(model, nnx.Param, (Rank, nnx.RngState), ...)
    trees = nnx.as_pure(params), nnx.as_pure(state)
    return dict(zip(MODEL_ITEMS, trees, strict=True))


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by `"/"`-joined path.

    Raises:
      UserError: Two leaves have one path, such as "x/y" next to "x" that holds "y".
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    flat: dict[str, Any] = {}
    colliding = []
    for path, leaf in leaves:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        colliding += [key] if key in flat else []
        flat[key] = leaf
    if colliding:
        raise UserError(
            f"paths: must be one array's each, got several for {colliding}. Rename the"
            ' modules or dictionary keys that have a "/" in their name.'
        )
    return flat


def rank_axes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Finds which axes (from the end) of a model's parameters are the rank, by path."""
    return {key: axes for key, (_, axes) in _factor_arrays(model).items()}


def _factor_arrays(
    model: nnx.Module,
) -> dict[str, tuple[Factors, tuple[int, ...]]]:
    """The arrays that are cut with a rank, at all their paths: whose, and their rank
    axes."""
    return {
        f"{path}/{name}".removeprefix("/"): (node, axes)
        for path, node in walk(model)
        if isinstance(node, Factors)
        for name, axes in node.rank_axes.items()
        if getattr(node, name) is not None
    }


def _axes_of(item: str, key: str, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The rank axes of an array: a parameter's by its path, a moment's by those of the
    parameter that its path ends in, the longest there is."""
    axes, params = metadata["rank_axes"], metadata["arrays"]["params"]
    parts = key.split("/")
    starts = range(1 if item in MODEL_ITEMS else len(parts))
    ends = ("/".join(parts[start:]) for start in starts)
    param = next((end for end in ends if end in params or end in axes), None)
    return tuple(axes.get(param, ()))


def _contents(
    step: int,
    model: nnx.Module,
    metadata: Mapping[str, Any],
    items: Mapping[str, Any] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What a checkpoint holds: arrays by item and path, and the metadata, checked.

    Raises:
      TypeError: The metadata hold something other than JSON values.
      UserError: Two arrays have one path.
    """
    trees = {**model_items(model), **(items or {})}
    flat = {name: flatten(tree) for name, tree in trees.items()}
    about = {
        **metadata,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "step": step,
        "ranks": get_ranks(model),
        "max_ranks": max_ranks(model),
        "rank_rules": rules_of(model),
        "rank_axes": rank_axes(model),
        "arrays": {name: _describe(leaves) for name, leaves in flat.items()},
    }
    return flat, json.loads(json.dumps(about))  # a copy: it is written later


def _at_ranks(model: nnx.Module, params: Any, ranks: Ranks) -> Any:
    """Shapes of the parameters with the factors of each layer allocated at these
    ranks."""
    arrays = _factor_arrays(model)
    paths = {id(factors): path for path, factors in find_factors(model).items()}

    def shape(key_path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sizes = list(leaf.shape)
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if key in arrays:
            factors, axes = arrays[key]
            for axis in axes:
                sizes[axis] = largest(ranks[paths[id(factors)]])
        return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

    return jax.tree.map_with_path(shape, params)


def _describe(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [list(x.shape), str(x.dtype)] for key, x in leaves.items()}


def _differences(
    name: str, leaves: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[str]:
    """How a template departs from the stored arrays, other than by lower ranks."""
    stored = metadata["arrays"].get(name)
    if stored is None:
        known = sorted(metadata["arrays"])
        return [f"{name}: is not in the checkpoint, which has {known}"]
    problems = [
        f"{name}/{key}: is not in the checkpoint" for key in leaves - stored.keys()
    ]
    problems += [f"{name}/{key}: is not in the model" for key in stored.keys() - leaves]
    for key in leaves.keys() & stored.keys():
        (shape, dtype), leaf = stored[key], leaves[key]
        wanted = list(leaf.shape)
        fits = len(shape) == len(wanted)
        for axis in _axes_of(name, key, metadata) if fits else ():
            wanted[axis] = max(wanted[axis], shape[axis])
        if not fits or wanted != shape or str(leaf.dtype) != dtype:
            problems.append(
                f"{name}/{key}: is {dtype}{shape} in the checkpoint,"
                f" {leaf.dtype}{list(leaf.shape)} in the model"
            )
    return sorted(problems)
