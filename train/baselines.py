"""Models to compare a nested one with, trained by its own recipe: dense ones that are
cut by their SVD afterwards, models of one size alone, the nested one of other seeds.

A recipe is the config's one phase: its optimizer, its length, its batches, and the
step of `train.step`. All seeds of one kind share a compiled program, an epoch of steps;
several kinds are trained at a time, as no step of a small model keeps two cores busy.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from lowrank_jax import active, factorization
from lowrank_jax.families import Family
from train import evaluation, phases
from train.opening import Opened
from train.report import logs
from train.run import Run
from train.state import Structure, TrainState, new_state, split_model
from train.step import make_train_step

NESTED = "one nested model, cut"
DENSE = "dense model, cut by SVD"
ALONE = "trained for one size"
AT_ONCE = 2
"""Kinds that are trained at a time."""

Rows = list[evaluation.Figures]
Steps = Callable[[PRNGKeyArray, TrainState, Any], TrainState]
"""From the seed's key, a state and a stack of batches to the state after them."""


class Kind(NamedTuple):
    """Models that differ in the seed alone.

    Args:
      series: What they are shown as.
      config: How they are trained.
      seeds: From which seeds.
      alone: The one size that they are trained for; None where they are cut.
    """

    series: str
    config: Mapping[str, Any]
    seeds: Sequence[int]
    alone: float | None = None


def misfit(config: Mapping[str, Any]) -> str:
    """Returns why a config, completed, has no such baselines; "" where it has."""
    if len(config["phases"]) != 1:
        return f"it has {len(config['phases'])} phases"
    (spec,) = config["phases"]
    if spec["sampler"]["name"] == "full":
        return "it trains one size alone"
    parts = ("penalties", "projections", "shrink", "on_end", "pass_weights")
    more = [name for name in parts if spec[name]]
    more += ["a condition"] if "condition" in spec["until"] else []
    more += ["trainable"] if list(spec["trainable"]) != [".*"] else []
    more += [name for name in ("init_from", "recalibration_batches") if config[name]]
    if more:
        return f"its recipe has {', '.join(more)}"
    if not all(rule in ("full", "dense") for _, rule in config["rank_rules"]):
        return "its rank rules are more than full and dense"
    return ""


def kinds(
    config: Mapping[str, Any], seeds: Sequence[int], alone: Sequence[float]
) -> list[Kind]:
    """Lists what is trained beside a nested run.

    Args:
      config: The run's, completed.
      seeds: All seeds, the run's own first.
      alone: Sizes for which models are trained alone.
    """
    (spec,) = config["phases"]
    plain = {
        "sampler": {"name": "full", "args": {}},
        "teacher": {"name": "none", "args": {}},
        "sizes": "masked",
        "pass_parts": 1,
    }
    single = {**config, "phases": [{**spec, **plain}]}
    found = [Kind(NESTED, config, seeds[1:])] if seeds[1:] else []
    found.append(Kind(DENSE, {**single, "rank_rules": [[".*", "dense"]]}, seeds))
    for fraction in alone:
        rules = [
            [pattern, {"rank_fraction": fraction} if rule == "full" else rule]
            for pattern, rule in config["rank_rules"]
        ]
        found.append(Kind(ALONE, {**single, "rank_rules": rules}, seeds, fraction))
    return found


def compare(
    whole: Opened, *, seeds: int, fractions: Sequence[float], alone: Sequence[float]
) -> dict[str, Rows]:
    """Trains the baselines of a nested run; returns the test figures of each series.

    A line says why there are none, where there are none.

    Args:
      whole: The run's last checkpoint, opened: the first seed of the nested series.
      seeds: How many; the run's own and those that follow it. 1 for no baselines.
      fractions: Sizes at which nested and dense models are cut.
      alone: As of `kinds`.

    Returns:
      Rows by series, of each seed and size; a row has its "seed" and "rank_fraction".
    """
    config = whole.run.config
    numbers = range(config["seed"], config["seed"] + seeds)
    evaluator = whole.evaluator("test", translate=False)
    first = _judged(evaluator, whole.model, numbers[0], fractions, whole.family)
    reason = "--seeds is 1" if seeds == 1 else misfit(config)
    if whole.run.placement.mesh.size > 1:
        reason = reason or "they are trained on one device, and there are several"
    if reason:
        logs.say(f"no baselines: {reason}")
        return {NESTED: first}
    series: dict[str, Rows] = {NESTED: first, DENSE: [], ALONE: []}

    stop = threading.Event()

    def rows_of(kind: Kind) -> Rows:
        if kind.alone is not None:
            return _rows_alone(whole.run, kind, stop)
        return _rows_cut(whole.run, kind, evaluator, fractions, stop)

    todo = kinds(config, numbers, alone)
    logs.say(f"baselines: {sum(len(kind.seeds) for kind in todo)} models ...")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for kind, rows in zip(todo, pool.map(rows_of, todo), strict=True):
                series[kind.series] += rows
        except BaseException:  # Ctrl-C too: the pool waits for its threads
            stop.set()
            raise
    return series


def _rows_cut(
    run: Run,
    kind: Kind,
    evaluator: evaluation.Evaluator,
    fractions: Sequence[float],
    stop: threading.Event,
) -> Rows:
    """Trains models of a kind, and judges each at several sizes."""
    began, rows = time.monotonic(), []
    for seed, model in trained(run._replace(config=kind.config), kind.seeds, stop):
        if kind.series == DENSE:
            rules = [(pattern, rule) for pattern, rule in run.config["rank_rules"]]
            model = factorization.factorize(model, rules)
        rows += _judged(evaluator, model, seed, fractions)
    _say(kind, began)
    return rows


def _rows_alone(run: Run, kind: Kind, stop: threading.Event) -> Rows:
    """Trains models of one size, and judges each at it."""
    began, rows, evaluator = time.monotonic(), [], None
    run = run._replace(config=kind.config)
    for seed, model in trained(run, kind.seeds, stop):
        evaluator = evaluator or Opened(run, model).evaluator("test", translate=False)
        (row,) = _judged(evaluator, model, seed, [1.0])
        rows.append({**row, "rank_fraction": kind.alone})
    _say(kind, began)
    return rows


def _say(kind: Kind, began: float) -> None:
    size = "" if kind.alone is None else f" ({kind.alone:g} of the ranks)"
    seeds = ", ".join(map(str, kind.seeds))
    seconds = time.monotonic() - began
    logs.say(f"{kind.series}{size}, seeds {seeds}: {seconds:.1f} s")


def _judged(
    evaluator: evaluation.Evaluator,
    model: nnx.Module,
    seed: int,
    fractions: Sequence[float],
    family: Family = (),
) -> Rows:
    _, params, model_state = split_model(model)
    ranks = active.get_ranks(model)
    rows = evaluation.sweep(evaluator, params, model_state, ranks, fractions, family)
    return [{"seed": seed, **row} for row in rows]


def trained(
    run: Run, seeds: Sequence[int], stop: threading.Event
) -> Iterator[tuple[int, nnx.Module]]:
    """Trains a run's one phase from several seeds, on one device.

    Args:
      run: What it is about.
      seeds: In the place of its config's own: of the initial values, of the order of
        the examples, of what is drawn.
      stop: Set by another thread to end it at the next epoch.

    Yields:
      A seed and its model, when it is trained.
    """
    (phase,) = phases.build_phases(run.config["phases"])
    running = phase.begin(0, phase.until.end(0, run.steps_per_epoch))
    several: Steps | None = None
    for seed in seeds:
        own = run._replace(config={**run.config, "seed": seed})
        structure, state = new_state(own.build_model(), running, 0)
        several = several or _make_steps(structure, running, run)
        for batches in _batches(own, running.end):
            if stop.is_set():
                return
            state = several(jax.random.key(seed), state, batches)
        yield seed, structure.merge(state.params, state.model_state, None)


def _make_steps(structure: Structure, running: phases.Running, run: Run) -> Steps:
    """Makes the steps on a stack of batches, one after the other in one call."""

    def steps(key: PRNGKeyArray, state: TrainState, batches: Any) -> TrainState:
        step = make_train_step(
            structure,
            running,
            run.task,
            key,
            accumulation_steps=run.config["accumulation_steps"],
            compute_dtype=run.config["compute_dtype"],
        )
        return jax.lax.scan(lambda *now: (step(*now)[0], None), state, batches)[0]

    return jax.jit(steps, donate_argnums=1)


def _batches(run: Run, steps: int) -> Iterator[Any]:
    """Yields the batches of so many steps, those of each epoch stacked."""
    batches = run.data.train_batches(run.batch_size, seed=run.config["seed"])
    while steps:
        some = list(itertools.islice(batches, min(steps, run.steps_per_epoch)))
        steps -= len(some)
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *some)
