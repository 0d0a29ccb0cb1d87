"""Time that `import lowrank_jax` takes, beside that of what every user of it imports.

`python -m benchmarks.import_time --rounds=9`: fresh processes in turn, one that imports
jax, flax (its NNX) and optax, one that imports this library, which imports these too;
their time on the processor, with their files in the cache of the disk. What the
application brings in is the third, for comparison. Ends with one line of JSON.
"""

import resource
import subprocess
import sys
from collections.abc import Callable

from absl import flags

from benchmarks import report, timing
from train import binary
from train.report import logs

BASE = "jax, flax, optax"
PROGRAMS = {
    BASE: "import jax, flax, optax; from flax import nnx",
    "lowrank_jax": "import lowrank_jax",
    "train.loop": "import train.loop",
}
"""What is imported, by the name of the row."""


def make_timer(program: str) -> Callable[[int], float]:
    """Makes a function that runs a program so many times, and says how much time of
    the processor one of them took, in s."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def timed(count: int) -> float:
        before = spent()
        for _ in range(count):
            subprocess.run([sys.executable, "-c", program], check=True)
        return (spent() - before) / count

    return timed


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Returns the rows of `timing.ratios`, by what is imported."""
    timers = {name: make_timer(program) for name, program in PROGRAMS.items()}
    return timing.ratios(timing.in_turn(timers, rounds, 1), BASE)


def _main() -> None:
    rows = measure(flags.FLAGS.rounds)
    report.show_ratios("An import in a fresh process", "import", rows, {})
    logs.emit(rows)


if __name__ == "__main__":
    report.define_flags()
    flags.DEFINE_integer("rounds", 9, "How often each; the median counts.", 1)
    binary.run(_main)
