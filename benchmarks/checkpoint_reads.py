"""Bytes read from disk to cut a checkpoint while loading it, against the bytes kept.

`python -m benchmarks.checkpoint_reads`: pairs of float32 factors of several widths, cut
to several ranks. Bytes are those of all the read calls of this process (`rchar` in
/proc/self/io, Linux), so what describes the arrays (two JSON files) is among them; it
is also shown alone, since at a width of 64 it is as large as what is kept. Ends with
the files of the last checkpoint and one line of JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, logging
from flax import nnx

from lowrank_jax import checkpoint, factorize
from train.report import logs

PAIRS = (
    *((64, 64, 64), (128, 128, 128), (256, 1024, 256), (512, 512, 512)),
    *((1024, 1024, 1024), (2048, 2048, 1024), (4096, 4096, 512), (8192, 8192, 256)),
)
"""Inputs, outputs and largest rank of a pair."""


class Reading(NamedTuple):
    """What one load read.

    Args:
      kept: Bytes of the arrays that came back.
      description: Bytes of the metadata and of the index of the arrays.
      total: Bytes that were read, the description included.
    """

    kept: int
    description: int
    total: int

    @property
    def arrays_ratio(self) -> float:
        return (self.total - self.description) / self.kept

    @property
    def ratio(self) -> float:
        return self.total / self.kept


def structure(inputs: int, outputs: int, rank: int) -> nnx.Module:
    """Makes a pair of factors without numbers (and without a bias)."""

    def build() -> nnx.Module:
        layer = nnx.Linear(inputs, outputs, use_bias=False, rngs=nnx.Rngs(0))
        return factorize(nnx.Dict(layer=layer), [(".*", {"max_rank": rank})])

    return nnx.eval_shape(build)


def save(path: Path, inputs: int, outputs: int, rank: int) -> None:
    """Writes a checkpoint of random factors."""
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(structure(inputs, outputs, rank))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jnp.full(leaf.shape, rank, jnp.int32)
        return jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)

    model = nnx.merge(graphdef, jax.tree.map(draw, state))
    checkpoint.save(path, model)


def read_cut(path: Path, abstract: nnx.Module, rank: int) -> Reading:
    """Opens a checkpoint and loads it at a rank."""
    checkpoint.load(checkpoint.open_checkpoint(path), abstract, ranks={"layer": rank})
    own = -bytes_read() + bytes_read()
    before = bytes_read()  # whatever had to be compiled is there
    saved = checkpoint.open_checkpoint(path)
    model = checkpoint.load(saved, abstract, ranks={"layer": rank})
    total = bytes_read() - before - own
    kept = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    files = (saved.path / "metadata/metadata", saved.path / "params/process_0.json")
    return Reading(kept, sum(file.stat().st_size for file in files), total)


def bytes_read() -> int:
    """Returns how many bytes this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _ranks(rank: int) -> list[int]:
    """A sixteenth, a quarter, and some that are nothing special."""
    return sorted({rank // 16, rank // 4, 3, rank // 9, rank // 5 + 1, rank // 2 + 3})


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every file at INFO
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for inputs, outputs, rank in PAIRS:
            path = Path(folder) / f"{inputs}x{outputs}"
            save(path, inputs, outputs, rank)
            for cut in _ranks(rank):
                reading = read_cut(path, structure(inputs, outputs, rank), cut)
                name = f"{inputs}x{outputs}, {rank} to {cut}"
                ratios = [round(reading.arrays_ratio, 3), round(reading.ratio, 3)]
                rows.append([name, reading.kept, reading.description, *ratios])
        headers = ["pair", "kept", "description", "arrays / kept", "all / kept"]
        print(logs.table(headers, rows))
        for file in sorted(path.rglob("*")):
            if file.is_file():
                print(f"{file.relative_to(path)}: {file.stat().st_size} bytes")
    print(json.dumps({row[0]: row[3:] for row in rows}))


if __name__ == "__main__":
    app.run(main)
