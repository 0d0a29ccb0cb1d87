"""How many rank vectors a search scores in a second.

`python -m benchmarks.search_speed --config=configs/nested.py`: scores a config's fresh
model, factorized by its rules, on held-out examples. Drawn vectors are all different;
the beam search asks for what it likes, and what it asks for twice is scored once. How
often the model was traced and compiled is counted. Ends with one line of JSON.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks import report
from lowrank_jax import active
from lowrank_jax.ranks import Ranks, flatten_rank
from lowrank_jax.selection import choosing
from train import binary, scoring, selecting
from train.config import to_json
from train.report import logs
from train.run import Run, open_run

BEAM = {"measure": "macs", "fraction": 0.5, "width": 4, "steps": 20}
_PROGRAM = "jit(sums)"
"""How jax names the program that judges a batch."""


def draw(ranks: Ranks, rng: np.random.Generator) -> Ranks:
    """Draws a rank for each matrix, from 1 up."""
    return {
        path: np.reshape(
            [int(rng.integers(1, max(one, 1) + 1)) for one in flatten_rank(rank)],
            np.shape(rank),
        ).tolist()
        for path, rank in ranks.items()
    }


def measure(
    run: Run, *, count: int, rounds: int, beam: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Returns rates in rank vectors a second, and how often the model was traced and
    compiled for them.

    Args:
      run: The config, opened.
      count: How many vectors are drawn for each round.
      rounds: The median of their rates is the result.
      beam: Arguments of the beam search.
      seed: Of the draws.
    """
    traced, compiled, task = 0, 0, run.task

    def sums(*args: Any) -> Any:
        nonlocal traced
        traced += 1
        return task.sums(*args)

    def note(event: str, seconds: float, **more: Any) -> None:
        nonlocal compiled
        del seconds
        if event.endswith("backend_compile_duration"):
            compiled += more.get("fun_name") == _PROGRAM

    run = run._replace(task=task._replace(sums=sums))
    model, rng = run.fresh_model(), np.random.default_rng(seed)
    ranks = active.get_ranks(model)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        score = scoring.make_score(model, run)
        first, _ = _timed(score, [ranks])
        drawn = [[draw(ranks, rng) for _ in range(count)] for _ in range(rounds)]
        rates = [count / _timed(score, vectors)[0] for vectors in drawn]
        context = choosing.context_of(model, run.cost(model), score=score)
        search, _ = _timed(selecting.select, {"name": "beam", "args": beam}, context)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return {
        "layers": len(ranks),
        "examples": sum(len(batch["weight"]) for batch in run.scoring_batches()),
        "vectors_per_second": statistics.median(rates),
        "first_seconds": first,
        "beam_seconds": search,
        "traced": traced,
        "compiled": compiled,
    }


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def _define_flags() -> None:
    """Not when imported: other binaries have flags of these names."""
    report.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config of the model and the data.")
    flags.DEFINE_integer("batch_size", 512, "Examples in a batch.", 1)
    flags.DEFINE_integer("batches", 4, "How many batches are scored on.", 1)
    flags.DEFINE_integer("count", 100, "Rank vectors drawn for a round.", 1)
    flags.DEFINE_integer("rounds", 5, "How many rounds are timed.", 1)
    flags.mark_flag_as_required("config")


def _main() -> None:
    given = flags.FLAGS
    config = given.config
    config.data.eval_batch_size = given.batch_size
    config.scoring_batches = given.batches
    run = open_run(to_json(config))
    figures = measure(run, count=given.count, rounds=given.rounds, beam=BEAM)
    about = f"{config.model.name}, {config.data.name}"
    report.show_figures(f"Rank vectors scored, {about}", figures)
    logs.emit(figures)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
