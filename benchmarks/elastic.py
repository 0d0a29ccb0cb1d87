"""Several sizes on one set of weights: time, memory, and a server under load.

`python -m benchmarks.elastic --subjects=mlp,vit --checkpoint=runs/quickstart/run`

- For each subject the time of a call at each size and batch, from NumPy to NumPy: with
  sizes as views, as slices, and of models that were cut and compiled alone. They run in
  turn, round by round, each size against the cut model of the same round.
- What changing the size at every call costs: the time of calls that go round all sizes
  less the mean time of calls that stay at one, round by round; and the bytes of weights
  beside those of the largest size, and of all cut models.
- With a checkpoint, examples/serve_digits.py in a thread of this process, asked by so
  many threads, each with a connection of its own: at the largest size, at the smallest
  after a switch, and at what the queue chooses. All share the cores, so that these are
  times of server and clients together.

Ends with one line of JSON.
"""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import uvicorn
from absl import flags
from flax import nnx
from sklearn import datasets

from benchmarks import report, subjects, timing
from configs import sizes
from examples import serve_digits
from lowrank_jax import Elastic, factorize, truncate
from lowrank_jax.active import max_ranks
from lowrank_jax.ranks import at_fraction
from train import binary
from train.report import logs

Row = dict[str, Any]


def make(
    subject: subjects.Subject, batches: Sequence[int]
) -> tuple[dict[str, Elastic], dict[str, nnx.Module], list[np.ndarray]]:
    """Returns a subject's sizes as "views" and "slices", its cut models by size, and
    its inputs."""
    model = factorize(subject.dense, subject.rules)
    model.eval()
    ranks = max_ranks(model)
    chosen = {f"{f:g}": at_fraction(ranks, f) for f in sizes.FRACTIONS}
    inputs = [np.asarray(x) for x in subject.task.inputs(subject.batch, None)]
    kinds = {
        name: Elastic(model, chosen, *inputs, batches=batches, views=views)
        for name, views in (("views", True), ("slices", False))
    }
    return kinds, {name: truncate(model, r) for name, r in chosen.items()}, inputs


def alone(model: nnx.Module) -> Callable[..., np.ndarray]:
    """Returns a cut model's function, compiled when it is first called."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: np.asarray(compiled(state, *inputs))


def timer(call: Callable[[int], Any]) -> Callable[[int], float]:
    """Returns a function that times so many calls, each given its number, in s each."""

    def timed(count: int) -> float:
        began = time.perf_counter()
        for number in range(count):
            call(number)
        return (time.perf_counter() - began) / count

    timed(2)
    return timed


def measure_calls(
    subject: subjects.Subject, batches: Sequence[int], rounds: int, calls: int
) -> dict[int, dict[str, Row]]:
    """Returns for each batch the times of each size, and ratios to the cut model."""
    kinds, cut, inputs = make(subject, batches)
    found: dict[int, dict[str, Row]] = {}
    for rows in batches:
        given = [array[:rows] for array in inputs]
        found[rows] = {}
        for name, model in cut.items():
            run = alone(model)
            timers = {"cut": timer(lambda n, run=run, x=given: run(*x))}
            for kind, one in kinds.items():
                timers[kind] = timer(
                    lambda n, one=one, x=given, name=name: one(*x, size=name)
                )
            times = timing.in_turn(timers, rounds, calls)
            ratios = timing.ratios(times, "cut")
            found[rows][name] = {
                "cut_ms": ratios["cut"]["ms"],
                **{f"{kind}_ms": ratios[kind]["ms"] for kind in kinds},
                **{kind: ratios[kind]["ratio"] for kind in kinds},
                "spread": ratios["views"]["spread"],
            }
    return found


def measure_switching(subject: subjects.Subject, rounds: int, calls: int) -> Row:
    """Returns what changing the size at every call costs, for one row, and bytes."""
    kinds, cut, inputs = make(subject, (1,))
    elastic, given = kinds["views"], [array[:1] for array in inputs]
    names = list(elastic.sizes)
    timers = {
        name: timer(lambda n, name=name: elastic(*given, size=name)) for name in names
    }
    timers["in turn"] = timer(lambda n: elastic(*given, size=names[n % len(names)]))
    times = timing.in_turn(timers, rounds, calls * len(names))
    staying = np.mean([times[name] for name in names], axis=0)
    costs = 1e6 * (np.asarray(times["in turn"]) - staying)
    low, middle, high = np.percentile(costs, [25, 50, 75])
    each = [_bytes(model) for model in cut.values()]
    return {
        "staying_us": 1e6 * float(np.median(staying)),
        "switch_us": float(middle),
        "spread_us": float(high - low) / 2,
        "kib": elastic.nbytes / 1024,
        "largest_kib": max(each) / 1024,
        "all_kib": sum(each) / 1024,
    }


def _bytes(model: nnx.Module) -> int:
    """Bytes of a model's weights."""
    floats = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return sum(array.nbytes for array in jax.tree.leaves(floats))


@contextlib.contextmanager
def serving(elastic: Elastic, costs: serve_digits.Costs) -> Iterator[int]:
    """Serves in a thread while the block runs; yields the port."""
    app = serve_digits.make_app(elastic, costs)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def send(
    connection: http.client.HTTPConnection, method: str, path: str, given: Any
) -> tuple[int, Any]:
    """Returns status and answer of a request."""
    connection.request(method, path, json.dumps(given))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def measure_load(port: int, defaults: Sequence[str], clients: int, seconds: float):
    """Asks for so many seconds with each default size, which a request changes while
    the others run on; returns a row for each.

    A request belongs to the default that was set when it began.
    """
    images = datasets.load_digits().images[:clients].astype(int)
    current, stop, done = [defaults[0]], threading.Event(), []

    def ask(pixels: Sequence[int]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while not stop.is_set():
            default, began = current[0], time.perf_counter()
            try:
                status, answer = send(connection, "POST", "/predict", {"image": pixels})
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                status, answer = 0, {"error": str(error)}
            taken = time.perf_counter() - began
            done.append((default, status, answer.get("size"), taken))
        connection.close()

    threads = [
        threading.Thread(target=ask, args=(image.ravel().tolist(),)) for image in images
    ]
    switches = {}
    for thread in threads:
        thread.start()
    try:
        for default in defaults:
            control = http.client.HTTPConnection("127.0.0.1", port)
            control.connect()
            began = time.perf_counter()
            status, _ = send(control, "PUT", "/size", {"size": default})
            switches[default] = time.perf_counter() - began
            control.close()
            assert status == 200
            current[0] = default
            time.sleep(seconds)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return {
        default: _row([x for x in done if x[0] == default], seconds, switches[default])
        for default in defaults
    }


def _row(done: Sequence[tuple], seconds: float, switch: float) -> Row:
    """The figures of requests; latencies are those of the ones that were answered."""
    answered = [taken for _, status, _, taken in done if status == 200]
    ran = {size for _, status, size, _ in done if status == 200}
    p50, p95 = 1000 * np.percentile(answered, [50, 95])
    return {
        "ran": " ".join(sorted(ran, key=float, reverse=True)),
        "requests_per_s": len(answered) / seconds,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "put_ms": 1000 * switch,
        "failed": len(done) - len(answered),
    }


def _show(title: str, first: str, rows: Mapping[Any, Row]) -> None:
    columns = list(next(iter(rows.values())))
    cells = [[name, *(row[key] for key in columns)] for name, row in rows.items()]
    report.show(title, [first, *(key.replace("_", " ") for key in columns)], cells)


def _define_flags() -> None:
    report.define_flags()
    flags.DEFINE_list(
        "subjects", ["mlp", "lenet", "vit", "shakespeare:cpu"], "What to time."
    )
    flags.DEFINE_list("batches", ["1", "8"], "Rows of a call.")
    flags.DEFINE_integer("rounds", 15, "Rounds; each variant runs once in each.", 1)
    flags.DEFINE_integer("calls", 20, "Calls of each variant in a round.", 1)
    flags.DEFINE_string("checkpoint", "", "What is served; none for no load test.")
    flags.DEFINE_integer("clients", 16, "Threads that ask.", 1)
    flags.DEFINE_float("seconds", 5.0, "How long at each default size.", 0.0)


def _main() -> None:
    given = flags.FLAGS
    figures: dict[str, Any] = {"calls": {}, "switching": {}}
    batches = [int(text) for text in given.batches]
    for name in given.subjects:
        subject = subjects.make(name, max(batches))
        timed = measure_calls(subject, batches, given.rounds, given.calls)
        for rows, found in timed.items():
            _show(f"{name}, batch {rows}", "size", found)
        figures["calls"][name] = timed
        figures["switching"][name] = measure_switching(
            subject, given.rounds, given.calls
        )
    if given.subjects:
        _show("A size of its own for every call", "model", figures["switching"])
    if given.checkpoint:
        elastic, costs = serve_digits.load(given.checkpoint, sizes.FRACTIONS)
        largest, *_, smallest = elastic.sizes
        defaults = [largest, smallest, serve_digits.AUTO]
        with serving(elastic, costs) as port:
            rows = measure_load(port, defaults, given.clients, given.seconds)
        _show(f"{given.clients} clients of the server", "default", rows)
        figures["load"] = rows
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
