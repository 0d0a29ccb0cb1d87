"""Blocks of rows in a file: written and read on several threads, each with a checksum.

A table of rows says where they are: `offset` in the file, `row_bytes`, the `ends` of
its blocks in rows, and the CRC-32 of each (`crc32`).
"""

import concurrent.futures
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax.errors import DamagedCheckpoint

BLOCK_BYTES = 4 * 2**20
"""Blocks are not made larger than this, but for the sake of a single row."""

_THREADS = min(4, os.cpu_count() or 1)
"""That read or write one array at the same time."""

_TILE = 512
"""Numbers of an axis that are copied at once where another axis is to be the last."""


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


def write_rows(file: Any, offset: int, rows: np.ndarray) -> dict[str, Any]:
    """Writes an array's rows, one after the other, from an offset on.

    Args:
      file: An open file; what its buffer holds is not touched.
      offset: Where to begin.
      rows: Numbers in any order of memory; the first axis is that of the rows.

    Returns:
      The table of these rows.
    """
    row_bytes = rows.nbytes // len(rows)
    ends = block_ends(len(rows), row_bytes)
    edges, crc32 = [0, *ends], [0] * len(ends)

    def write(blocks: range) -> None:
        for block in blocks:
            first, end = edges[block : block + 2]
            data = _in_order(rows[first:end]).reshape(-1).view(np.uint8)
            crc32[block] = zlib.crc32(data.data)
            place = offset + first * row_bytes
            while data.size:
                written = os.pwrite(file.fileno(), data.data, place)
                data, place = data[written:], place + written

    _on_threads(write, range(len(ends)), rows.nbytes)
    return {"offset": offset, "row_bytes": row_bytes, "ends": ends, "crc32": crc32}


def read_blocks(
    path: Path,
    table: Mapping[str, Any],
    blocks: range,
    take: Callable[[int, int, np.ndarray], None],
) -> None:
    """Reads blocks and checks each.

    Args:
      path: The file.
      table: Of its rows.
      blocks: Which.
      take: Gets the first row of a block, the row past its last, and its bytes, which
        it must not keep; from several threads.

    Raises:
      DamagedCheckpoint: The file ends too soon, or differs from a checksum.
    """
    edges, row_bytes = [0, *table["ends"]], table["row_bytes"]
    sizes = [row_bytes * (edges[n + 1] - edges[n]) for n in blocks]

    def read(several: range) -> None:
        memory = np.empty(max(sizes), np.uint8)
        with path.open("rb", buffering=0) as file:
            for block in several:
                first, end = edges[block : block + 2]
                data = memory[: (end - first) * row_bytes]
                _read_checked(file, table["offset"] + first * row_bytes, data)
                expected, found = table["crc32"][block], zlib.crc32(data.data)
                if found != expected:
                    raise DamagedCheckpoint(
                        f"its checksum must be {expected:08x}, got {found:08x}."
                    )
                take(first, end, data)

    _on_threads(read, blocks, sum(sizes))


def _read_checked(file: Any, place: int, data: np.ndarray) -> None:
    """Fills memory with the bytes of a file from a place on."""
    file.seek(place)
    size = 0
    while size < len(data) and (count := file.readinto(data[size:])):
        size += count
    if size < len(data):
        raise DamagedCheckpoint(
            f"must have {place + len(data)} bytes, got {place + size}."
        )


def _on_threads(work: Callable[[range], None], blocks: range, size: int) -> None:
    """Does some work on blocks; where they have many bytes, on several threads, as
    checksums, copies and files leave the interpreter to others."""
    count = min(_THREADS, size // BLOCK_BYTES)
    if count < 2:
        work(blocks)
        return
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, blocks[n::count]) for n in range(count)]:
            done.result()


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
