"""Time of our training steps against the same steps in plain PyTorch.

`make peers`: installs PyTorch into .venv-peers and runs `python -m benchmarks.peers`.
The same networks, shapes and optimizer (SGD with momentum); dense, factored at full
rank, and Maestro's step (one layer at a random rank) with and without its lasso. Their
process (peers_torch.py) waits while ours runs, and the other way round, round by round.
`ratio` is our time over theirs. Ends with one line of JSON.
"""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from flax import nnx

from benchmarks import report, subjects, timing
from benchmarks.step_time import LASSO
from configs import common
from lowrank_jax import factorize
from lowrank_jax.errors import UserError
from train import binary
from train.report import logs

PEER = pathlib.Path(__file__).with_name("peers_torch.py")
OURS: dict[str, dict[str, Any]] = {
    "dense": {},
    "full": {"sampler": common.named("full")},
    "maestro": {"sampler": common.named("single_layer")},
    "maestro, lasso": {"sampler": common.named("single_layer"), "penalties": LASSO},
}
"""Keys of the phase, by the names that the variants have there."""


class Peer:
    """The other process.

    `about` has its version and threads, and the parameters of each variant.

    Args:
      process: It, with lines of text to and fro.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.about = json.loads(self._answer())

    def timer(self, variant: str) -> Callable[[int], float]:
        """Returns what times so many steps of a variant there, in s a step."""

        def timed(steps: int) -> float:
            line = json.dumps({"variant": variant, "steps": steps})
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return float(self._answer())

        return timed

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(
                f"--python: must run {PEER.name}, got status {self._process.wait()}"
                " (its own words are above). `make peers` installs what it needs."
            )
        return line


@contextlib.contextmanager
def started(python: str, subject: str, size: int) -> Iterator[Peer]:
    """Starts the other process, and ends it.

    Raises:
      UserError: There is no such interpreter, or it cannot run the steps.
    """
    if not pathlib.Path(python).exists():
        raise UserError(
            f"--python: must be an interpreter with PyTorch, got {python!r}, which does"
            " not exist. Run `make peers`."
        )
    command = [python, str(PEER), subject, str(size)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Peer(process)
        finally:
            process.stdin.close()  # its loop ends


def measure(
    subject: subjects.Subject, peer: Peer, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Returns for each variant our time, theirs, and the ratios of both.

    Raises:
      UserError: A variant has other numbers of parameters there.
    """
    batch = jax.device_put(subject.batch)
    low_rank = factorize(subject.dense, subject.rules)
    models = {name: low_rank for name in OURS} | {"dense": subject.dense}
    timers: dict[str, Callable[[int], float]] = {}
    for name, spec in OURS.items():
        model = jax.tree.map(jax.numpy.copy, models[name])
        numbers = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        if numbers != peer.about["parameters"][name]:
            raise UserError(
                f"peers: {name} must have {numbers:,} parameters on both sides, got"
                f" {peer.about['parameters'][name]:,} there. Build the same network."
            )
        timers[name] = timing.make_timer(model, spec, subject.task, batch).timed
        timers[f"{name} there"] = peer.timer(name)
    times = timing.in_turn(timers, rounds, steps)
    rows = []
    for name in OURS:
        there = f"{name} there"
        ours = timing.ratios(times, there)[name]
        row = {"step": name, "ms": ours["ms"]}
        row["pytorch_ms"] = timing.ratios(times, there)[there]["ms"]
        row |= {"ratio": ours["ratio"], "spread": ours["spread"]}
        row["to_dense"] = timing.ratios(times, "dense")[name]["ratio"]
        row["pytorch_to_dense"] = timing.ratios(times, "dense there")[there]["ratio"]
        rows.append(row)
    return rows


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_string("python", ".venv-peers/bin/python", "Has PyTorch.")
    names = ["lenet", "resnet18", "shakespeare:cpu"]
    flags.DEFINE_list("subjects", names, f"What to time, of {list(subjects.SUBJECTS)}.")
    flags.DEFINE_integer("rounds", 7, "Rounds; each variant runs once in each.", 1)
    flags.DEFINE_integer("steps", 5, "Steps of each variant in a round.", 1)
    flags.DEFINE_integer("batch_size", 0, "Examples; 0 for the subject's own.", 0)


def _main() -> None:
    given, figures = flags.FLAGS, {}
    for name in given.subjects:
        subject = subjects.make(name, given.batch_size)
        size = len(next(iter(subject.batch.values())))
        with started(given.python, name, size) as peer:
            rows = measure(subject, peer, given.rounds, given.steps)
        figures[name] = rows
        headers = ["step", "ms", "PyTorch ms", "ratio", "+-", "to dense"]
        headers.append("PyTorch's to dense")
        about = f"PyTorch {peer.about['torch']}, {peer.about['threads']} threads"
        cells = [list(row.values()) for row in rows]
        report.show(f"{name}, batch {size}", headers, cells, about)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
