"""Memory and time to cut a large checkpoint, against what it keeps.

`python -m benchmarks.truncation --workdir=DIR --params=1e9`: an MLP of 16 low-rank
layers, each n x n at rank n / 2, so that its factors have as many numbers as its dense
twin, cut to a quarter of them by `python -m train.truncate` in a process of its own.
`params_fraction` looks at ranks alone, `energy_budget` at all weights, so it reads all
of them.

- Memory: the largest resident size of that process (VmHWM, Linux) over what it had
  when all modules were imported; to be at most 1.5 times the largest layer plus what is
  kept.
- Time: from then to its end, and whole, with the start of Python and its imports. The
  floor is to read as many bytes as are kept from the same file into a buffer of 4 MiB
  and to write them to a plain file beside it, with an fsync; the second floor reads all
  bytes, for what looks at all. Least of `--rounds`, in turn. The checkpoint is in the
  system's cache, or dropped from it before each (`--cold`). A pause comes before each:
  a virtual machine gives freed memory back to its host after a while, and a process
  that comes sooner finds pages that cost nothing (a floor of 0.9 s for 2.4 s at 1e9).

The checkpoint (4 bytes a parameter) is made once and deleted at the end. Ends with one
line of JSON.
"""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import report
from configs import common
from lowrank_jax import checkpoint, factorize
from train import binary
from train.data.pixels import PIXELS
from train.models import mlp
from train.report import logs

LAYERS = 16
SELECTORS = {
    "params_fraction": ("--params_fraction=0.25",),
    "energy_budget": ("--select=energy_budget", "--params=0.25"),
}
"""Flags of `train.truncate`, by the selector's name."""
_BUFFER = 4 * 2**20
_CUT = """
import json, runpy, sys, time

import train.binary, train.checkpoints, train.exporting, train.selecting


def memory(key):
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return 1024 * int(lines[key].split()[0])


before, began = memory("VmRSS"), time.perf_counter()
file = sys.argv[1]
sys.argv = ["train.truncate", *sys.argv[2:]]
try:
    runpy.run_module("train.truncate", run_name="__main__", alter_sys=True)
finally:
    seconds = time.perf_counter() - began
    with open(file, "w") as file:
        json.dump({"bytes": memory("VmHWM") - before, "seconds": seconds}, file)
"""


class Cut(NamedTuple):
    """What one cut took.

    Args:
      bytes: The peak of memory, over what the process had after its imports.
      seconds: From then to the end.
      whole_seconds: With the start of the process and its imports.
      kept: Bytes of the arrays in the new checkpoint.
    """

    bytes: int
    seconds: float
    whole_seconds: float
    kept: int


def width(params: float) -> int:
    """Returns the least even width of 16 layers that have this many parameters.

    >>> width(1e9)
    7906
    """
    return 2 * math.ceil(math.sqrt(params / LAYERS) / 2)


def write(path: Path, params: float) -> None:
    """Writes a checkpoint as a run would have; random columns that fall off in size,
    in some layers sooner than in others."""
    size = width(params)
    config = common.base(seed=0)
    common.digits(config, batch_size=1)
    for key, value in PIXELS["digits"].items():  # a run writes them out
        config.task["args"][key] = tuple(value)
    config.model = common.named("mlp", hidden=(size,) * (LAYERS - 1))
    config.rank_rules = ((".*", {"max_rank": size // 2}),)
    image = {"shape": [1, size, 1], "dtype": "uint8"}
    arrays = {"image": image, "label": {"shape": [], "dtype": "int32"}}
    facts = {"arrays": arrays, "num_classes": size}

    def build() -> nnx.Module:
        args = {"image_shape": (1, size, 1), "num_classes": size}
        model = mlp.build(**args, **config.model.args, rngs=nnx.Rngs(0))
        return factorize(model, config.rank_rules)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int32:  # the active rank
            return jnp.full(leaf.shape, size // 2, jnp.int32)
        values = random.standard_normal(leaf.shape, np.float32)
        if leaf.shape == (size, size // 2):
            values *= np.arange(1, 1 + size // 2) ** -random.uniform(0.1, 0.9)
        return jnp.asarray(values)

    model = nnx.merge(graphdef, jax.tree.map(draw, state))
    metadata = {"config": config.to_dict(), "facts": facts}
    checkpoint.save(path, model, metadata=metadata)


def cut(source: Path, output: Path, selector: Sequence[str]) -> Cut:
    """Runs `train.truncate` in a process of its own; its output is deleted."""
    figures = output.with_suffix(".json")
    arguments = (f"--checkpoint={source}", f"--output={output}", *selector)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _CUT, str(figures), *arguments],
        check=True,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
    )
    whole = time.perf_counter() - began
    kept = arrays_of(output).stat().st_size
    shutil.rmtree(output)
    found = json.loads(figures.read_text())
    figures.unlink()
    return Cut(**found, whole_seconds=whole, kept=kept)


def arrays_of(path: Path) -> Path:
    """Returns the file with the arrays of a checkpoint."""
    return checkpoint.open_checkpoint(path).path / "params/process_0.bin"


def copy(source: Path, output: Path, *, read: int, written: int) -> float:
    """Returns the seconds to read a file's first bytes, and to write the first of
    these to a new file, which is deleted."""
    buffer = memoryview(bytearray(_BUFFER))
    began = time.perf_counter()
    with source.open("rb", buffering=0) as old, output.open("wb", buffering=0) as new:
        while read > 0:
            count = old.readinto(buffer[: min(_BUFFER, read)])
            new.write(buffer[: min(count, written)])
            read, written = read - count, max(written - count, 0)
        os.fsync(new.fileno())
    seconds = time.perf_counter() - began
    output.unlink()
    return seconds


def drop_from_cache(file: Path) -> None:
    """Has the system forget what it holds of a file that is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    folder: Path, params: float, *, rounds: int, pause: float, cold: bool = False
) -> dict[str, dict[str, float]]:
    """Makes a checkpoint, cuts it by each selector, deletes it.

    Args:
      folder: Where to; what is made in it is deleted.
      params: Numbers in the factors of all layers, about.
      rounds: How often; the least time counts, and the largest memory.
      pause: Seconds before each cut and each copy.
      cold: Whether the checkpoint is dropped from the system's cache before each.

    Returns:
      Figures by selector; bytes and seconds.
    """
    with tempfile.TemporaryDirectory(dir=folder) as made:
        source, output = (Path(made).absolute() / name for name in ("source", "cut"))
        writer = multiprocessing.get_context("spawn").Process(  # which takes its memory
            target=write, args=(source, params)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise OSError(f"{source}: was not written, status {writer.exitcode}.")
        file = arrays_of(source)

        def settle() -> None:
            if cold:
                drop_from_cache(file)
            time.sleep(pause)

        return {
            name: {
                "layer": 4 * width(params) ** 2,
                **_measure_one(source, output, selector, rounds, settle),
            }
            for name, selector in SELECTORS.items()
        }


def _measure_one(
    source: Path,
    output: Path,
    selector: Sequence[str],
    rounds: int,
    settle: Callable[[], None],
) -> dict[str, float]:
    """The figures of one selector."""
    file = arrays_of(source)
    cuts = []
    seconds: dict[str, list[float]] = {"floor": [], "floor_reading_all": []}
    for _ in range(rounds):
        settle()
        cuts.append(cut(source, output, selector))
        kept, total = cuts[-1].kept, file.stat().st_size
        for floor, read in (("floor", kept), ("floor_reading_all", total)):
            settle()
            seconds[floor].append(copy(file, output, read=read, written=kept))
    return {
        "bytes": max(one.bytes for one in cuts),
        "kept": cuts[0].kept,
        "seconds": min(one.seconds for one in cuts),
        "whole_seconds": min(one.whole_seconds for one in cuts),
        **{floor: min(values) for floor, values in seconds.items()},
    }


def table(found: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """Returns a row for each selector: memory in MiB and against its bar, seconds and
    against both floors."""
    rows: list[list[Any]] = [
        ["selector", "peak MiB", "largest layer", "kept", "peak / bar", "s"]
        + ["floor s", "s / floor", "reading all s", "s / reading all", "with imports s"]
    ]
    for name, row in found.items():
        bar = 1.5 * row["layer"] + row["kept"]
        mib = [row[key] / 2**20 for key in ("bytes", "layer", "kept")]
        both = [row["floor"], row["floor_reading_all"]]
        ratios = [[floor, row["seconds"] / floor] for floor in both]
        cells = [*mib, row["bytes"] / bar, row["seconds"], *ratios[0], *ratios[1]]
        rows.append([name, *cells, row["whole_seconds"]])
    return rows


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_string("workdir", None, "Folder for the checkpoints, on a disk.")
    flags.DEFINE_float("params", 1e9, "Numbers in all factors, about.", 1e3)
    flags.DEFINE_integer("rounds", 3, "How often.", 1)
    flags.DEFINE_float("pause", 6.0, "Seconds before each cut and each copy.", 0.0)
    flags.DEFINE_bool("cold", False, "Drop the checkpoint from the system's cache.")
    flags.mark_flag_as_required("workdir")


def _main() -> None:
    given = flags.FLAGS
    folder = Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(
        folder,
        given.params,
        rounds=given.rounds,
        pause=given.pause,
        cold=given.cold,
    )
    headers, *cells = table(found)
    cache = "not in the system's cache" if given.cold else "in the system's cache"
    about = f"{given.params:g} numbers cut to a quarter, checkpoint {cache}"
    report.show(about, headers, cells)
    logs.emit(found)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
