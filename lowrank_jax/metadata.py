"""What the metadata of a checkpoint must be, before anything relies on it.

The digest says that they are as they were written; this says that what wrote them was
this library, and not a script that put them together by hand.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lowrank_jax.errors import UserError, raise_all
from lowrank_jax.ranks import flatten_rank

METADATA_FILE = Path("metadata") / "metadata"
"""Where it is in the folder of a step."""
_LARGEST = 2**31 - 1


def check_metadata(metadata: Any) -> None:
    """Checks the keys that this library wrote itself; those of a caller are its own.

    Raises:
      UserError: Missing keys or values of another kind; all of them at once.
    """
    if not isinstance(metadata, Mapping):
        raise UserError(f"metadata: must be a mapping, got {metadata!r}. Use another.")
    raise_all(
        [
            f"metadata.{place}: must be {rule}, got {value!r}. Use another checkpoint,"
            " or the program that wrote this one."
            for place, rule, value in _problems(metadata)
        ]
    )


def _problems(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields place, rule and value of everything that is wrong."""
    step = metadata.get("step")
    if not _is_size(step):
        yield "step", "a whole number >= 0", step
    for key in ("ranks", "max_ranks"):
        ranks = metadata.get(key)
        if not isinstance(ranks, Mapping):
            yield key, "ranks by path", ranks
            continue
        for path, rank in ranks.items():
            if not _is_rank(rank):
                yield f"{key}.{path}", "a rank, or nested lists of them", rank
    yield from _mismatches(metadata.get("ranks"), metadata.get("max_ranks"))
    arrays, axes = metadata.get("arrays"), metadata.get("rank_axes")
    if not isinstance(arrays, Mapping) or "params" not in arrays:
        yield "arrays", "items by name, params among them", arrays
        arrays = {}
    for item, leaves in arrays.items():
        if not isinstance(leaves, Mapping):
            yield f"arrays.{item}", "arrays by path", leaves
            continue
        for key, about in leaves.items():
            if not _is_array(about):
                yield f"arrays.{item}.{key}", "a shape and a dtype", about
    if not isinstance(axes, Mapping):
        yield "rank_axes", "axes by path", axes
        return
    for key, numbers in axes.items():
        if not isinstance(numbers, list) or not all(
            type(axis) is int and axis in (-1, -2) for axis in numbers
        ):
            yield f"rank_axes.{key}", "a list of -1 and -2", numbers


def _mismatches(active: Any, allocated: Any) -> Iterator[tuple[str, str, Any]]:
    """Active ranks are of the layers of the allocated ones, and nowhere above."""
    if not isinstance(active, Mapping) or not isinstance(allocated, Mapping):
        return
    if active.keys() != allocated.keys():
        yield "ranks", f"of the layers {sorted(allocated)}", sorted(active)
    for path in active.keys() & allocated.keys():
        rank, most = active[path], allocated[path]
        if not _is_rank(rank) or not _is_rank(most):
            continue  # said already
        numbers, limits = flatten_rank(rank), flatten_rank(most)
        if len(numbers) != len(limits) or any(map(int.__gt__, numbers, limits)):
            yield f"ranks.{path}", f"at most {most}", rank


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_rank(value: Any) -> bool:
    """Whether a value is a rank, or lists of ranks of equal lengths."""
    if not isinstance(value, list):
        return _is_size(value)
    shapes = {len(part) if isinstance(part, list) else None for part in value}
    return len(shapes) < 2 and all(map(_is_rank, value))


def _is_array(value: Any) -> bool:
    """Whether a value is a shape, of a size that can be, and the name of a dtype."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    shape, dtype = value
    if not all(map(_is_size, shape)) or math.prod(shape) > 2**62:
        return False
    return isinstance(dtype, str) and (is_dtype(dtype) or dtype.startswith("key<"))


def is_dtype(name: str) -> bool:
    """Returns whether text is the name that a dtype of arrays has."""
    try:
        return name.isidentifier() and str(jnp.dtype(name)) == name
    except TypeError:
        return False
