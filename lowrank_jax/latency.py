"""How long layers take at their ranks: measured on the device at hand, kept in a file.

A layer is measured by itself, jitted, at a ladder of ranks and in each form that it may
take, in turn with its dense twin; equal layers are measured once. A whole model's time
at any ranks is then what its dense twin takes, less what its layers save.
"""

import hashlib
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowrank_jax.counting import Call, trace_calls
from lowrank_jax.errors import UserError, at
from lowrank_jax.factors import Factors
from lowrank_jax.latency_files import DENSE, Table, read_table, write_table
from lowrank_jax.layers import LowRankLayer
from lowrank_jax.nnx_internals import attributes
from lowrank_jax.paths import find_factors, find_layers
from lowrank_jax.ranks import Ranks, largest, lowest, name_of
from lowrank_jax.surgery import merge, take_forms, truncate
from lowrank_jax.times import MERGED, LayerTimes, ModelTimes

_ROUNDS = 9
_LEAST = 2e-3  # seconds that a round runs each variant for
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_MODEL = re.compile(r"^model name\s*: (.*)$", re.MULTILINE)


def device_name() -> str:
    """Names what measures here: a device, how much of it there is, and the versions."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        path = Path("/proc/cpuinfo")
        found = _MODEL.search(path.read_text()) if path.exists() else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        name = found[1] if found else platform.processor() or platform.machine()
        name = f"{cores or os.cpu_count()} cores of {name}"
    return f"{name}, jax {jax.__version__}"


class LatencyTable:
    """Times of layers on one device, measured when they are first asked for.

    Args:
      path: JSON file that keeps them: read if it is there, written after measuring.
        None keeps them in memory.
      any_device: Take a file of another device or of another version of JAX too; what
        is measured here is not written into it.
      points: How many ranks of a layer are measured.

    Attributes:
      layers: What is known, by a name that says all that a layer's time depends on but
        its form and its rank.

    Raises:
      UserError: The file is of another device, or no such table.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        any_device: bool = False,
        points: int = 6,
    ):
        self._path, self._points = None if path is None else Path(path), points
        self._device, self._foreign = device_name(), False
        self.layers: Table = {}
        if self._path is not None and self._path.exists():
            with at(f"latency table {self._path}"):
                theirs, self.layers = read_table(self._path)
                self._foreign = theirs != self._device
                if self._foreign and not any_device:
                    raise UserError(
                        f"must be of this device, {self._device}, got one of {theirs}."
                        " Measure here into a new file, or allow any device."
                    )

    def times(
        self,
        model: nnx.Module,
        *example: Any,
        forms: Collection[str] = (Factors.form, MERGED),
        at_ranks: Ranks | None = None,
    ) -> ModelTimes:
        """Returns a model's times as a function of its ranks, up to the active ones.

        Args:
          model: A low-rank model with its arrays; only their shapes matter.
          *example: Its arguments, of the batch size that it will be used at (arrays or
            `jax.ShapeDtypeStruct`).
          forms: The forms that a layer may take, keys of `forms.FORMS` or
            `times.MERGED`.
          at_ranks: The one rank of each layer to measure at; a ladder of them by
            default.

        Raises:
          UserError: A layer that no call shows, that is stacked for a scan, or that
            takes more than one array.
        """
        if not forms:
            raise UserError("forms: must be one at least, got none. Name one.")
        rows = called_layers(model, *example)
        # Of equal layers the one whose rank is highest: it has all ranks of the others.
        rows.sort(key=lambda row: largest(row[1].factors.get_rank()))
        calls = {_key(layer, call): (path, layer, call) for path, layer, call in rows}
        ranks: dict[str, set[int]] = {key: set() for key in calls}
        for owner, layer, call in rows:
            rank = None if at_ranks is None else largest(at_ranks[owner])
            with at(name_of(owner)):
                ranks[_key(layer, call)] |= _wanted(layer, rank, self._points)
        known = json.dumps(self.layers)
        for key, (path, layer, call) in calls.items():
            with at(name_of(path)):
                self._complete(key, layer, call, forms, ranks[key])
        changed = json.dumps(self.layers) != known
        if self._path is not None and changed and not self._foreign:
            write_table(self._path, self._device, self.layers)
        timers = {
            key: make_timer(merge(layer), _filled(call.inputs), method=call.method)
            for key, (_, layer, call) in calls.items()
        }
        timers["model"] = make_timer(merge(model), *map(_filled, example))
        timers["call"] = make_timer(_Nothing(), jax.numpy.zeros(()))
        now = _in_turn(timers)
        layers: dict[str, LayerTimes] = {}
        for owner, layer, call in rows:
            key = _key(layer, call)
            times = self._at_speed(key, now[key], forms, ranks[key])
            times = times.less(now["call"])  # which the model pays once
            layers[owner] = layers[owner] + times if owner in layers else times
        return ModelTimes.of(now["model"], layers)

    def _complete(
        self,
        key: str,
        layer: LowRankLayer,
        call: Call,
        forms: Collection[str],
        ranks: Collection[int],
    ) -> None:
        """Measures what is not known of a layer."""
        entry = {form: {**of} for form, of in self.layers.get(key, {}).items()}
        missing = [
            (form, rank)
            for form in forms
            for rank in sorted(ranks)
            if form != MERGED and str(rank) not in entry.get(form, {})
        ]
        if not missing and DENSE in entry:
            return
        measured = _measure_layer(layer, call, missing)
        now = measured.pop((DENSE, 0))
        before = entry.setdefault(DENSE, {"0": now})["0"]
        for (form, rank), nanoseconds in measured.items():
            # as a share of dense: what was measured on another day agrees
            entry.setdefault(form, {})[str(rank)] = nanoseconds / now * before
        self.layers[key] = entry

    def _at_speed(
        self, key: str, dense: float, forms: Collection[str], ranks: Collection[int]
    ) -> LayerTimes:
        """What is known of a layer, where its dense twin takes so long today."""
        entry = self.layers[key]
        scale = dense / entry[DENSE]["0"]
        known = {
            form: {rank: scale * entry[form][str(rank)] for rank in sorted(ranks)}
            if form != MERGED
            else {0: dense}
            for form in forms
        }
        return LayerTimes(dense, known)


class _Nothing(nnx.Module):
    """What takes no more than a call does."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + 1


def called_layers(
    model: nnx.Module, *example: Any
) -> list[tuple[str, LowRankLayer, Call]]:
    """Lists the calls of all low-rank layers, by the path that their factors have."""
    calls = trace_calls(model, *example)
    owners = {id(factors): path for path, factors in find_factors(model).items()}
    rows = [
        (owners[id(layer.factors)], layer, call)
        for path, (layer, _) in find_layers(model).items()
        if isinstance(layer, LowRankLayer)
        for call in calls[path]
    ]
    if unseen := set(owners.values()) - {owner for owner, _, _ in rows}:
        raise UserError(
            "latency: must be of layers that the model calls, got no call of"
            f" {', '.join(map(name_of, sorted(unseen)))}. Give a budget of MACs."
        )
    return rows


def measure(
    models: Mapping[str, nnx.Module], *example: Any, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Measures models in turn, jitted and in evaluation mode.

    Args:
      models: By name.
      *example: Their arguments (arrays or `jax.ShapeDtypeStruct`).
      rounds: Each runs once a round.

    Returns:
      The median time of a call of each, in ns.
    """
    inputs = [_filled(one) for one in example]
    return _in_turn(
        {name: make_timer(model, *inputs) for name, model in models.items()}, rounds
    )


def _measure_layer(
    layer: LowRankLayer, call: Call, wanted: Collection[tuple[str, int]]
) -> dict[tuple[str, int], float]:
    """Times a layer by itself, dense and at some forms and ranks, in turn."""
    if len(layer.factors.stack_shape) > len(layer.fold.stack_axes):
        raise UserError(
            "latency: must be of single layers, got a stack of them for a scan. Give a"
            " budget of MACs."
        )
    variants = {(DENSE, 0): merge(layer)}
    active = layer.factors.get_rank()
    for form, rank in wanted:
        cut = truncate(layer, {"": lowest(active, rank)})
        variants[form, rank] = take_forms(cut, {"": form})
    inputs = _filled(call.inputs)
    try:
        compiled = {
            name: make_timer(one, inputs, method=call.method)
            for name, one in variants.items()
        }
    except TypeError as error:  # its own arguments are missing
        raise UserError(
            "latency: must be of a layer that takes one array, got a"
            f" {type(layer).__name__} ({error}). Give a budget of MACs."
        ) from error
    return _in_turn(compiled)


def make_timer(
    model: nnx.Module, *inputs: Any, method: str = "__call__"
) -> Callable[[int], float]:
    """Compiles a call in evaluation mode, and makes a function that times so many of
    them, in s a call."""
    model = nnx.clone(model)
    model.eval()
    graph, state = nnx.split(model)
    call = jax.jit(
        lambda state, *inputs: getattr(nnx.merge(graph, state), method)(*inputs)
    )
    run = call.lower(state, *inputs).compile()

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            outputs = run(state, *inputs)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - began) / calls

    timed(2)
    return timed


def _in_turn(
    timers: Mapping[Any, Callable[[int], float]], rounds: int = _ROUNDS
) -> dict[Any, float]:
    """Runs all variants in turn, round by round; returns their medians in ns."""
    calls = {
        name: max(1, math.ceil(_LEAST / max(timed(1), 1e-7)))
        for name, timed in timers.items()
    }
    times: dict[Any, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timed in timers.items():
            timed(1)
            times[name].append(timed(calls[name]))
    return {name: 1e9 * statistics.median(several) for name, several in times.items()}


def _filled(shape: Any) -> jax.Array:
    """An array for a shape; an array stays."""
    if not isinstance(shape, jax.ShapeDtypeStruct):
        return jax.numpy.asarray(shape)
    rng = np.random.default_rng(0)
    if jax.numpy.issubdtype(shape.dtype, jax.numpy.floating):
        return jax.numpy.asarray(rng.standard_normal(shape.shape), shape.dtype)
    return jax.numpy.zeros(shape.shape, shape.dtype)


def _wanted(layer: LowRankLayer, rank: int | None, points: int) -> set[int]:
    """The ranks to measure: a given one, or 1, the active one, and evenly spaced ones
    between."""
    active = largest(layer.factors.get_rank())
    if rank is not None and rank > active:
        raise UserError(
            f"rank must be at most the active one, {active}, got {rank}. Lower it."
        )
    if rank is not None or not active:
        return {rank or 0}
    spaced = {round(active * step / points) for step in range(1, points + 1)}
    return ({1} | spaced) - {0}


def _key(layer: LowRankLayer, call: Call) -> str:
    """What a layer's time depends on, but for form and rank: shapes to be read, and a
    digest of all that its attributes say."""
    kernel = "x".join(map(str, layer.fold.kernel_shape))
    shapes = [
        f"{one.dtype}[{','.join(map(str, one.shape))}]"
        for one in (call.inputs, call.outputs)
    ]
    about = {
        name: getattr(value, "__qualname__", _ADDRESS.sub("", repr(value)))
        for name, value in attributes(layer).items()
        if not isinstance(value, nnx.Module | nnx.Variable | nnx.Rngs)
    }
    factors = layer.factors
    about["factors"] = f"{type(factors).__name__} {factors.depth} {factors.s is None}"
    digest = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    kind = f"{type(layer).__name__}.{call.method}"
    dtype = factors.u.dtype
    return f"{kind} {dtype}[{kernel}] {' -> '.join(shapes)} {digest}"
