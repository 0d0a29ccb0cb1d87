"""Time of models cut at several ranks against the dense one, and against their MACs.

`python -m benchmarks.inference --subjects=resnet18,shakespeare:cpu`: the forward pass
on random batches, of one example (latency) and of many (throughput). A layer whose
factors take no fewer MACs than its merged kernel is merged first. Variants run in turn,
round by round. The last column is (dense time / time) / (dense MACs / MACs): 1 where a
model is as much faster as its MACs promise. Ends with one line of JSON.
"""

import jax
from absl import flags
from flax import nnx

from benchmarks import report, subjects, timing
from configs import sizes
from lowrank_jax import count, factorize, latency, merge, truncate
from lowrank_jax.active import max_ranks
from lowrank_jax.ranks import at_fraction
from train import binary
from train.report import logs
from train.tasks.base import Task


def cut(model: nnx.Module, fraction: float, task: Task) -> nnx.Module:
    """Returns a low-rank model cut for use: merged where factors do not pay."""
    small = truncate(model, at_fraction(max_ranks(model), fraction))
    cost, ranks = count(small, *task.example), max_ranks(small)
    dear = [
        path
        for path, layer in cost.layers.items()
        if layer.factored_macs(ranks[path]) >= layer.dense_macs
    ]
    return merge(small, dear) if dear else small


def measure(
    subject: subjects.Subject, rounds: int, calls: int
) -> dict[int, dict[str, dict[str, float]]]:
    """Returns the rows of both batch sizes, by what is timed."""
    low_rank = factorize(subject.dense, subject.rules)
    models = {"dense": subject.dense}
    for fraction in sizes.FRACTIONS:
        models[str(fraction)] = cut(low_rank, fraction, subject.task)
    macs = {}
    for name, model in models.items():
        cost = count(model, *subject.task.example)
        macs[name] = cost.macs(max_ranks(model))
    figures = {}
    for size in (1, len(next(iter(subject.batch.values())))):
        batch = {name: array[:size] for name, array in subject.batch.items()}
        inputs = subject.task.inputs(batch, jax.random.key(0))
        timers = {n: latency.make_timer(m, *inputs) for n, m in models.items()}
        rows = timing.ratios(timing.in_turn(timers, rounds, calls), "dense")
        for name, row in rows.items():
            row["macs"] = macs[name] / macs["dense"]
            row["of_promise"] = row["macs"] / row["ratio"]
        figures[size] = rows
    return figures


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_list("subjects", ["resnet18", "shakespeare:cpu"], "What to time.")
    flags.DEFINE_integer("rounds", 7, "Rounds; each variant runs once in each.")
    flags.DEFINE_integer("calls", 5, "Calls of each variant in a round.")


def _main() -> None:
    every = {}
    for name in flags.FLAGS.subjects:
        subject = subjects.make(name)
        every[name] = measure(subject, flags.FLAGS.rounds, flags.FLAGS.calls)
        for size, rows in every[name].items():
            more = {"MACs": "macs", "of promise": "of_promise"}
            report.show_ratios(f"{name}, batch {size}", "model", rows, more)
    logs.emit(every)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
