"""Cutting while loading reads what it keeps and little more, at every width; so does
loading a layer alone."""

import gc
import json
import shutil
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from saved_models import ACTIVE, Net, Scanned, arrays, low_rank, structure

from benchmarks import checkpoint_reads
from lowrank_jax import checkpoint
from lowrank_jax.active import set_ranks
from lowrank_jax.errors import DamagedCheckpoint, UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.paths import find_factors

folder = saved_models.folder

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


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("kind", [Net, Scanned])
def test_a_layer_alone_is_as_in_the_whole_model(kind, with_s, tmp_path):
    """Its numbers, dtypes and active rank: groups, stacks, a tied layer, bfloat16."""
    model = low_rank(kind, with_s)
    set_ranks(model, ACTIVE if kind is Net else {"layers": [1, 2, 4]})
    checkpoint.save(tmp_path / "model", model)
    saved, abstract = (
        checkpoint.open_checkpoint(tmp_path / "model"),
        structure(kind, with_s),
    )
    layers = find_factors(checkpoint.load(saved, abstract))
    assert len(layers) == {Net: 4, Scanned: 1}[kind]
    for path, whole in layers.items():
        alone = checkpoint.load_layer(saved, abstract, path)
        assert type(alone) is type(whole) and alone.get_rank() == whole.get_rank()
        found, expected = arrays(alone), arrays(whole)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)


def test_a_layer_alone_reads_its_own_bytes(tmp_path):
    """Beside what describes all of them."""
    layers = {
        name: nnx.Linear(256, 64 * n, use_bias=False, rngs=nnx.Rngs(n))
        for n, name in enumerate("abcd", 1)
    }
    model = factorize(nnx.Dict(layers))
    checkpoint.save(tmp_path / "model", model)
    saved = checkpoint.open_checkpoint(tmp_path / "model")
    index = (saved.path / "params/process_0.json").stat().st_size
    abstract = nnx.eval_shape(lambda: model)
    own = -checkpoint_reads.bytes_read() + checkpoint_reads.bytes_read()
    for path in layers:
        before = checkpoint_reads.bytes_read()
        factors = checkpoint.load_layer(saved, abstract, path)
        read = checkpoint_reads.bytes_read() - before - own
        assert read == index + 4 * (factors.u.size + factors.v.size)


def test_arrays_are_read_to_where_they_stay(tmp_path):
    """Memory beside theirs is that of a few blocks, and JAX takes theirs as it is."""
    shape = (4096, 4096)
    model = nnx.Dict(w=nnx.Param(jnp.ones(shape)))
    checkpoint.save(tmp_path / "model", model)
    saved, abstract = (
        checkpoint.open_checkpoint(tmp_path / "model"),
        nnx.eval_shape(lambda: model),
    )
    tracemalloc.start()
    try:
        loaded = checkpoint.load(saved, abstract)
        gc.collect()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = loaded.w.nbytes
    assert size <= kept < 1.05 * size  # a copy of JAX's own would not be seen
    assert peak < 1.5 * size


def test_a_layer_of_another_model_is_named(folder):
    saved = checkpoint.open_checkpoint(folder)
    message = r"(?s)^first: checkpoint .*float32\[6, 8\] in the .*float32\[6, 4\]"
    with pytest.raises(UserError, match=message):
        checkpoint.load_layer(saved, structure(width=4), "first")
    with pytest.raises(UserError, match="low-rank layers must be"):
        checkpoint.load_layer(saved, structure(Scanned), "layers")


def test_damage_to_one_layer_is_found_with_it_alone(folder, tmp_path):
    """And named; the others are read."""
    shutil.copytree(folder, tmp_path / "bad")
    saved = checkpoint.open_checkpoint(tmp_path / "bad")
    file = saved.path / "params/process_0.json"
    (piece,) = json.loads(file.read_text())["pieces"]["first/factors/v"]
    with (saved.path / "params/process_0.bin").open("r+b") as data:
        data.seek(piece["offset"])
        data.write(b"nonsense")
    checkpoint.load_layer(saved, structure(), "half")
    with pytest.raises(DamagedCheckpoint, match="array first/factors/v: its checksum"):
        checkpoint.load_layer(saved, structure(), "first")
