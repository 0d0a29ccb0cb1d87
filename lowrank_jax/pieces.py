"""Arrays in plain files: written in pieces by every process, read in part, checked.

A folder holds two files for each process I that wrote into it:

- `process_I.bin`: the bytes of its pieces, one piece after the other. A piece is what
  one device holds of one array (the whole array where there is one device), in rows:
  its leading axis is the axis along which it can be read in part (the rank axis of a
  factor), the other axes follow in order.
- `process_I.json`: how many processes wrote, and for every array by its key its pieces:
  `start` and `shape` in the array, `axis`, `offset` in the file, `row_bytes`, and the
  `ends` of blocks of rows with the CRC-32 of each (`crc32`); `sha256` is the digest of
  all the others.

Blocks grow by an eighth, up to 4 MiB, so that a prefix of any length lies in blocks of
at most 1.125 times its rows, and large arrays have few checksums. Only whole blocks are
read, and none is used unchecked.
"""

import bisect
import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.blocks import read_blocks, write_rows
from lowrank_jax.errors import DamagedCheckpoint

_ALIGNED = 64
"""Bytes at whose multiples JAX wants memory that it takes as it is."""

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)

Index = dict[str, list[dict[str, Any]]]
"""Pieces by key; each also says of which `process` it is."""


class Piece(NamedTuple):
    """A part of an array, on the host.

    Args:
      key: Which array it is of.
      start: Where it begins there.
      axis: The axis (from the end) along which it can be read in part.
      values: Its numbers, which do not change.
    """

    key: str
    start: tuple[int, ...]
    axis: int
    values: np.ndarray


def take_pieces(arrays: Mapping[str, Any], axes: Mapping[str, int]) -> list[Piece]:
    """Takes what this process has to write; the arrays may be donated afterwards.

    Of an array that spans processes each process writes what it holds, and nothing
    twice; any other array is process 0's to write.

    Args:
      arrays: JAX or NumPy arrays by key.
      axes: Axes (from the end) along which an array can be read in part, by key; the
        others are read so along their first axis.
    """
    held: list[tuple[str, tuple[int, ...], Any]] = []
    for key, array in arrays.items():
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            if jax.process_index():
                continue
        if isinstance(array, jax.Array):
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    start, _ = _bounds(shard.index, array.shape)
                    shard.data.copy_to_host_async()  # all of them run at once
                    held.append((key, start, shard.data))
        else:
            held.append((key, (0,) * array.ndim, array))
    return [
        Piece(key, start or (0,), axes.get(key, -data.ndim), _on_host(data))
        for key, start, data in held
    ]


def _on_host(data: Any) -> np.ndarray:
    """Numbers that nobody changes. On a CPU these are the array's own: JAX does not
    reuse memory that NumPy looks at, though it be donated."""
    values = np.asarray(data) if isinstance(data, jax.Array) else np.array(data)
    return values.reshape(values.shape or 1)


def write_pieces(folder: Path, pieces: list[Piece], process: int, count: int) -> None:
    """Writes the files of one process; returns when the disk has them.

    Args:
      folder: Where to; it exists.
      pieces: What this process holds.
      process: Its number.
      count: How many processes write.
    """
    index: dict[str, list[dict[str, Any]]] = {}
    offset = 0
    with _synced(folder / f"process_{process}.bin") as file:
        for key, start, axis, values in pieces:
            rows = write_rows(file, offset, np.moveaxis(values, axis, 0))
            entry = {"start": start, "shape": values.shape, "axis": axis % values.ndim}
            index.setdefault(key, []).append({**entry, **rows})
            offset += values.nbytes
    about = {"processes": count, "process": process, "pieces": index}
    with _synced(folder / f"process_{process}.json") as file:
        file.write(json.dumps(seal(about)).encode())


def read_arrays(folder: Path, templates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays by key, each in the shape and under the sharding of its template.

    A smaller template reads a prefix along each axis. Every process reads what its own
    devices need.

    Args:
      folder: Where they were written.
      templates: Arrays or `jax.ShapeDtypeStruct` of the stored dtypes; without a
        sharding they go to the first device of this process.

    Raises:
      DamagedCheckpoint: Something is missing, cut off, or differs from its checksum.
    """
    arrays = {
        key: jnp.zeros(leaf.shape, leaf.dtype, device=_sharding_of(leaf))
        for key, leaf in templates.items()
        if not math.prod(leaf.shape)
    }
    filled = {key: leaf for key, leaf in templates.items() if key not in arrays}
    if not filled:
        return arrays
    with _opened(folder) as index:
        read = {
            key: _read_array(key, index.get(key, []), leaf, folder)
            for key, leaf in filled.items()
        }
    return {**arrays, **read}


def verify_pieces(folder: Path) -> None:
    """Reads all that was written into a folder.

    Raises:
      DamagedCheckpoint: Something is missing, cut off, or differs from its checksum.
    """
    with _opened(folder) as index:
        for key, pieces in index.items():
            for piece in pieces:
                with _named(key, piece):
                    blocks = range(len(piece["ends"]))
                    read_blocks(_file_of(folder, piece), piece, blocks, lambda *_: None)


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the digest of all the rest in it."""
    rest = {key: item for key, item in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(value: Mapping[str, Any]) -> None:
    """Checks the digest of a JSON object.

    Raises:
      DamagedCheckpoint: It is another one, or there is none.
    """
    found, expected = value.get("sha256"), seal(value)["sha256"]
    if found != expected:
        raise DamagedCheckpoint(
            f"its digest must be {str(found)[:8]}, got {expected[:8]}."
        )


def _read_index(folder: Path) -> Index:
    """The pieces of all processes that wrote."""
    merged: Index = {}
    process, count = 0, 1
    while process < count:
        file = folder / f"process_{process}.json"
        try:
            about = json.loads(file.read_bytes())
            check_seal(about)
        except (ValueError, AttributeError) as error:
            raise DamagedCheckpoint(f"{file.name}: {error}") from error
        count = about["processes"]
        for key, pieces in about["pieces"].items():
            merged.setdefault(key, []).extend({**p, "process": process} for p in pieces)
        process += 1
    return merged


def _read_array(
    key: str,
    pieces: list[dict[str, Any]],
    template: Any,
    folder: Path,
) -> jax.Array:
    shape, dtype = template.shape, jnp.dtype(template.dtype)
    sharding = _sharding_of(template)
    indices = sharding.addressable_devices_indices_map(shape).values()
    regions = [_bounds(index, shape) for index in indices]
    low = tuple(map(min, zip(*(start for start, _ in regions), strict=True)))
    high = tuple(map(max, zip(*(end for _, end in regions), strict=True)))
    values = _empty([b - a for a, b in zip(low, high, strict=True)], dtype)
    filled = 0
    for piece in pieces:
        with _named(key, piece):
            region = values.reshape(values.shape or 1)
            filled += _read_piece(piece, region, low or (0,), folder)
    if filled != values.size:
        raise DamagedCheckpoint(
            f"array {key}: must have {values.size} numbers, got {filled}."
        )

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, end = _bounds(index, shape)
        inside = zip(start, end, low, strict=True)
        return values[tuple(slice(a - n, b - n) for a, b, n in inside)]

    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX does not copy on a CPU, for the numbers of an array."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    first = -memory.ctypes.data % _ALIGNED
    return memory[first : first + size].view(dtype).reshape(shape)


def _sharding_of(template: Any) -> jax.sharding.Sharding:
    """Where an array is to go. `eval_shape` under `jax.set_mesh` knows the mesh's shape
    alone; its devices are those of the mesh that is set."""
    sharding = getattr(template, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh = sharding.mesh
        if isinstance(mesh, jax.sharding.AbstractMesh):
            mesh = jax.sharding.get_mesh()
            fits = mesh.shape == sharding.mesh.shape
            sharding = jax.sharding.NamedSharding(mesh, sharding.spec) if fits else None
    if sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding


def _read_piece(
    piece: Mapping[str, Any],
    values: np.ndarray,
    low: tuple[int, ...],
    folder: Path,
) -> int:
    """Fills what a piece has of a region that begins at `low`; returns how much."""
    axis, ends, start = piece["axis"], piece["ends"], np.array(piece["start"])
    region_end = np.add(low, values.shape)
    begin = np.maximum(start, low)
    sizes = np.minimum(start + piece["shape"], region_end) - begin
    if np.any(sizes <= 0):
        return 0
    first, last = begin[axis] - start[axis], begin[axis] - start[axis] + sizes[axis]
    blocks = range(bisect.bisect_right(ends, first), bisect.bisect_left(ends, last) + 1)
    row_shape = [n for i, n in enumerate(piece["shape"]) if i != axis]
    source, into = _slices(begin - start, sizes), _slices(begin - low, sizes)
    inside = [part for i, part in enumerate(source) if i != axis]
    target = np.moveaxis(values[into], axis, 0)

    def take(block_first: int, block_end: int, data: np.ndarray) -> None:
        rows = data.view(values.dtype).reshape(-1, *row_shape)
        a, b = max(first, block_first), min(last, block_end)
        part = slice(a - block_first, b - block_first)
        target[a - first : b - first] = rows[(part, *inside)]

    read_blocks(_file_of(folder, piece), piece, blocks, take)
    return math.prod(sizes.tolist())


def _file_of(folder: Path, piece: Mapping[str, Any]) -> Path:
    return folder / f"process_{piece['process']}.bin"


def _slices(start: np.ndarray, sizes: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))


def _bounds(
    index: tuple[slice, ...] | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a device's part of an array begins and where it ends."""
    slices = index or (slice(None),) * len(shape)
    pairs = [s.indices(size)[:2] for s, size in zip(slices, shape, strict=True)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Any]:
    """A new file that is on the disk, not in its cache, when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named(key: str, piece: Mapping[str, Any]) -> Iterator[None]:
    """Says of which array and file it is that something is wrong."""
    try:
        yield
    except DamagedCheckpoint as error:
        place = f"process_{piece['process']}.bin: array {key}"
        raise DamagedCheckpoint(f"{place}: {error}") from error


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Index]:
    """The pieces in a folder; says of what goes wrong in which folder it is."""
    try:
        yield _read_index(folder)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder.name}/{error}") from error
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        name = Path(error.filename or folder).name
        raise DamagedCheckpoint(
            f"{folder.name}/{name}: must be readable, got {error.strerror}."
        ) from error
