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
import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.errors import DamagedCheckpoint

BLOCK_BYTES = 4 * 2**20
"""Blocks are not made larger than this, but for the sake of a single row."""

_TILE = 512
"""Numbers of an axis that are copied at once where another axis is to be the last."""

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
            rows = np.moveaxis(values, axis, 0)
            row_bytes = values.nbytes // len(rows)
            ends, crc32 = block_ends(len(rows), row_bytes), []
            for first, end in zip([0, *ends], ends, strict=False):
                block = _in_order(rows[first:end]).reshape(-1).view(np.uint8)
                crc32.append(zlib.crc32(block))
                file.write(block)
            entry = {"start": start, "shape": values.shape, "axis": axis % values.ndim}
            entry |= {"offset": offset, "row_bytes": row_bytes}
            entry |= {"ends": ends, "crc32": crc32}
            index.setdefault(key, []).append(entry)
            offset += values.nbytes
    about = {"processes": count, "process": process, "pieces": index}
    with _synced(folder / f"process_{process}.json") as file:
        file.write(json.dumps(seal(about)).encode())


def _in_order(rows: np.ndarray) -> np.ndarray:
    """Numbers in the order of their axes, copied in tiles where they are not: along a
    whole axis, each number of a row would be on a page of its own (a tenth of the
    speed)."""
    if rows.flags.c_contiguous:
        return rows
    block = np.empty(rows.shape, rows.dtype)
    for first in range(0, rows.shape[-1], _TILE):
        tile = slice(first, first + _TILE)
        block[..., tile] = rows[..., tile]
    return block


def block_ends(rows: int, row_bytes: int) -> list[int]:
    """Returns where the blocks of some rows end.

    >>> block_ends(40, 4)[14:]
    [15, 16, 18, 20, 22, 24, 27, 30, 33, 37, 40]
    """
    most = max(1, BLOCK_BYTES // row_bytes)
    ends = [1]
    while ends[-1] < rows:
        last = ends[-1]
        ends.append(min(rows, last + most, max(last + 1, 9 * last // 8)))
    return ends


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
    with _opened(folder) as (index, open_file):
        read = {
            key: _read_array(key, index.get(key, []), leaf, open_file)
            for key, leaf in filled.items()
        }
    return {**arrays, **read}


def verify_pieces(folder: Path) -> None:
    """Reads all that was written into a folder.

    Raises:
      DamagedCheckpoint: Something is missing, cut off, or differs from its checksum.
    """
    with _opened(folder) as (index, open_file):
        for key, pieces in index.items():
            for piece in pieces:
                with _named(key, piece):
                    for block in range(len(piece["ends"])):
                        _read_block(open_file(piece["process"]), piece, block)


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
    open_file: Callable[[int], Any],
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
            filled += _read_piece(piece, region, low or (0,), open_file)
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
    open_file: Callable[[int], Any],
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
    file, edges = open_file(piece["process"]), [0, *ends]
    row_shape = [n for i, n in enumerate(piece["shape"]) if i != axis]
    source, into = _slices(begin - start, sizes), _slices(begin - low, sizes)
    inside = [part for i, part in enumerate(source) if i != axis]
    target = np.moveaxis(values[into], axis, 0)
    for block in blocks:
        data = _read_block(file, piece, block)
        rows = np.frombuffer(data, values.dtype).reshape(-1, *row_shape)
        a, b = max(first, edges[block]), min(last, edges[block + 1])
        part = slice(a - edges[block], b - edges[block])
        target[a - first : b - first] = rows[(part, *inside)]
    return math.prod(sizes.tolist())


def _slices(start: np.ndarray, sizes: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))


def _read_block(file: Any, piece: Mapping[str, Any], block: int) -> bytes:
    edges, row_bytes = [0, *piece["ends"]], piece["row_bytes"]
    begin, end = (piece["offset"] + row_bytes * row for row in edges[block : block + 2])
    data = os.pread(file.fileno(), end - begin, begin)
    if len(data) < end - begin:
        raise DamagedCheckpoint(f"must have {end} bytes, got {begin + len(data)}.")
    expected, found = piece["crc32"][block], zlib.crc32(data)
    if found != expected:
        raise DamagedCheckpoint(
            f"its checksum must be {expected:08x}, got {found:08x}."
        )
    return data


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
def _opened(folder: Path) -> Iterator[tuple[Index, Callable[[int], Any]]]:
    """The pieces in a folder, and what opens the file of a process; says of what goes
    wrong in which folder it is."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_file(process: int) -> Any:
            path = folder / f"process_{process}.bin"
            return stack.enter_context(path.open("rb", buffering=0))

        try:
            yield _read_index(folder), open_file
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{folder.name}/{error}") from error
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            name = Path(error.filename or folder).name
            raise DamagedCheckpoint(
                f"{folder.name}/{name}: must be readable, got {error.strerror}."
            ) from error
