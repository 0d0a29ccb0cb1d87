"""Cutting while loading reads what it keeps and little more, at every width."""

import sys

import pytest

from benchmarks import checkpoint_reads

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="bytes are those of /proc/self/io"
)
PAIRS = {"64": (64, 64, 64), "256x1024": (256, 1024, 256), "8192": (8192, 8192, 64)}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_cut_reads_little_more_than_it_keeps(pair, tmp_path):
    """At most 1.125 times the arrays that come back, at any rank; and it is they that
    are read."""
    checkpoint_reads.save(tmp_path / "pair", *pair)
    abstract = checkpoint_reads.structure(*pair)
    rank = pair[-1]
    for cut in (1, rank // 16, rank // 9, rank // 4, rank // 2 + 3, rank):
        reading = checkpoint_reads.read_cut(tmp_path / "pair", abstract, cut)
        assert reading.kept == (pair[0] + pair[1]) * cut * 4
        assert 1 <= reading.arrays_ratio <= 1.125
        assert reading.description < 3000


def test_a_cut_model_takes_the_room_of_its_ranks(tmp_path):
    """No file of a cut checkpoint holds what was cut off."""
    sizes = {}
    for rank in (128, 32):
        checkpoint_reads.save(tmp_path / str(rank), 512, 2048, rank)
        files = (tmp_path / str(rank)).rglob("*")
        sizes[rank] = [file.stat().st_size for file in files if file.is_file()]
    assert sum(sizes[32]) < 0.27 * sum(sizes[128])
    assert len(sizes[32]) == len(sizes[128]) == 7
