"""Blocks of rows: the bytes in the file, their checksums, and who reads them."""

import os
import threading
import zlib

import numpy as np
import pytest

from lowrank_jax.blocks import BLOCK_BYTES, read_blocks, write_rows
from lowrank_jax.errors import DamagedCheckpoint

ROWS = {
    "few": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns": np.arange(35, dtype=np.int16).reshape(5, 7).T,
    "stack": np.moveaxis(np.arange(600, dtype=np.float32).reshape(3, 20, 10), -1, 0),
    "numbers": np.arange(9, dtype=np.float64),
    "large": np.arange(6 * 2**20, dtype=np.float32).reshape(3072, -1),
    "large columns": np.arange(6 * 2**20, dtype=np.float32).reshape(2048, -1).T,
}
"""The large ones are written by several threads."""


@pytest.fixture(params=ROWS)
def written(request, tmp_path):
    """A file with eleven bytes and some rows behind them, the rows, their table."""
    rows, path = ROWS[request.param], tmp_path / "rows.bin"
    with path.open("wb") as file:
        file.write(b"eleven here")
        file.flush()
        table = write_rows(file, 11, rows)
    return path, rows, table


def test_rows_are_in_order_with_their_checksums(written):
    """Against NumPy's own bytes, and zlib over each block."""
    path, rows, table = written
    data = path.read_bytes()
    assert data[:11] == b"eleven here" and data[11:] == rows.tobytes()
    assert table["row_bytes"] * len(rows) == rows.nbytes and table["offset"] == 11
    edges = [11 + end * table["row_bytes"] for end in (0, *table["ends"])]
    assert edges[-1] == len(data) and sorted(set(edges)) == edges
    pairs = list(zip(edges, edges[1:], strict=False))
    assert table["crc32"] == [zlib.crc32(data[a:b]) for a, b in pairs]
    largest = max(b - a for a, b in pairs)
    assert largest <= max(BLOCK_BYTES, table["row_bytes"])


def test_each_block_is_read_once(written):
    """Of those asked for."""
    path, rows, table = written
    expected = np.ascontiguousarray(rows)
    for first in (0, len(table["ends"]) // 2):
        seen = {}

        def take(begin, end, data, seen=seen):
            same = data.tobytes() == expected[begin:end].tobytes()
            seen[begin, end] = (*seen.get((begin, end), ()), same)

        read_blocks(path, table, range(first, len(table["ends"])), take)
        edges = [0, *table["ends"]]
        blocks = set(zip(edges[first:], edges[first + 1 :], strict=False))
        assert seen == dict.fromkeys(blocks, (True,))


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread")
@pytest.mark.parametrize("written", ["large"], indirect=True)
def test_large_arrays_are_read_by_several_threads(written):
    """The first one waits for another, which would not come."""
    path, _, table = written
    threads, several = set(), threading.Event()

    def take(*_):
        threads.add(threading.get_ident())
        if len(threads) > 1:
            several.set()
        assert several.wait(timeout=60)

    read_blocks(path, table, range(len(table["ends"])), take)


def test_every_damage_is_found(written):
    """A byte of any block, and a file that ends too soon."""
    path, _, table = written
    data, edges = path.read_bytes(), [0, *table["ends"]]
    blocks = range(len(table["ends"]))
    for block in {0, len(blocks) // 2, len(blocks) - 1}:
        place = 11 + edges[block] * table["row_bytes"]
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match="its checksum must be"):
            read_blocks(path, table, blocks, lambda *_: None)
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"must have {len(data)} bytes, got"):
        read_blocks(path, table, blocks, lambda *_: None)
