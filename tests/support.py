"""What tests of training share: a small config, its runs, what a run leaves.

The runs are real: digits, the loop, checkpoints, a SIGTERM where one stops.
"""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from configs import common
from lowrank_jax import checkpoint
from train import checkpoints, loop, opening, phases
from train.config import to_json
from train.report import logs
from train.run import open_run
from train.stopping import Interrupted

DIGITS = 1437
"""Examples of scikit-learn's digits that are not test examples."""


def make_config(
    *phases: Mapping[str, Any],
    model: Mapping[str, Any],
    batch_size: int = 65,
    steps_per_epoch: int = 4,
    **changes: Any,
) -> dict[str, Any]:
    """Returns a config on digits as plain values: seconds to train.

    Args:
      *phases: Its phases, of `common.phase`.
      model: Name and arguments.
      batch_size: Examples a step.
      steps_per_epoch: Steps an epoch; what is left of the digits validates.
      **changes: Other keys of the config.
    """
    config = common.base(seed=3)
    common.digits(config, batch_size=batch_size)
    config.data.validation_examples = DIGITS - steps_per_epoch * batch_size
    config.data.eval_batch_size = 600
    config.model = model
    config.phases = phases
    config.eval_every_epochs = 0
    config.eval_fractions = (1.0, 0.5)
    config.log_every_steps = 2
    config.keep_checkpoints = 100
    for key, value in changes.items():
        config[key] = value
    return json.loads(json.dumps(config.to_dict()))


def put(config: dict[str, Any], place: str, value: Any) -> None:
    """Sets `place`, such as "phases/0/until"; deletes it if the value is `...`."""
    *parents, last = place.split("/")
    node: Any = config
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    key = int(last) if isinstance(node, list) else last
    if value is ...:
        del node[key]
    else:
        node[key] = value


def train(config: Mapping[str, Any], workdir: Path) -> checkpoint.Saved:
    """Trains to the end and opens the last checkpoint."""
    loop.train_and_evaluate(config, workdir)
    return checkpoint.open_checkpoint(workdir)


def at_step(workdir: Path, step: int) -> checkpoint.Saved:
    """The checkpoint of a step of a run."""
    return checkpoint.open_checkpoint(workdir / "checkpoints" / str(step))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends a real SIGTERM to this process once the step is done."""
    add = logs.StepMetrics.add

    def add_and_stop(self, done: int, *metrics: Any) -> None:
        add(self, done, *metrics)
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(logs.StepMetrics, "add", add_and_stop)


def interrupt(config: Mapping[str, Any], workdir: Path, step: int) -> None:
    """Trains until a SIGTERM comes after a step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=f"stopped at step {step};"):
            loop.train_and_evaluate(config, workdir)


def stored_arrays(saved: checkpoint.Saved) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by item and path."""
    templates = {
        item: {
            key: jax.ShapeDtypeStruct(tuple(shape), dtype)
            for key, (shape, dtype) in leaves.items()
        }
        for item, leaves in saved.metadata["arrays"].items()
    }
    return {
        f"{item}/{key}": np.asarray(array)
        for item, arrays in checkpoint.restore(saved, templates).items()
        for key, array in arrays.items()
    }


def assert_same_checkpoints(actual: checkpoint.Saved, expected: checkpoint.Saved):
    """Every array in every bit, the step, the ranks and what the run remembers."""
    arrays, wanted = stored_arrays(actual), stored_arrays(expected)
    assert arrays.keys() == wanted.keys()
    for key, array in arrays.items():
        assert array.dtype == wanted[key].dtype, key
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    for key in ("run", "ranks", "max_ranks", "rank_rules", "step"):
        assert actual.metadata.get(key) == expected.metadata.get(key), key


def metric_lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a mapping for each line."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, to see that nothing was changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Compiles as another process without a cache would."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


# What a test asks of a config or a checkpoint, in one call.


def fresh_model(config: Mapping[str, Any]) -> nnx.Module:
    """The model that a config starts with."""
    return open_run(to_json(config)).fresh_model()


def begin(spec: Mapping[str, Any], *, steps: int = 10, **fields: Any) -> phases.Running:
    """Begins the phase of a config at step 0.

    Args:
      spec: Of `common.phase`, as plain values.
      steps: How long it is.
      **fields: Values of fields that no config can name, such as a forced sampler.
    """
    (phase,) = phases.build_phases([phases.complete(spec)])
    return dataclasses.replace(phase, **fields).begin(0, steps)


def evaluate(path: Path, split: str = "test", **options: Any) -> dict[str, Any]:
    """Figures of a checkpoint at its ranks."""
    return opening.open_model(path, **options).figures(split)


def sweep(
    path: Path, fractions: Sequence[float], split: str = "test", **options: Any
) -> list[dict[str, Any]]:
    """Figures of a checkpoint at fractions of its ranks."""
    return opening.open_model(path).sweep(fractions, split, **options)


def truncate(
    path: Path, output: Path, name: str, value: Any, **options: Any
) -> dict[str, Any]:
    """Cuts a checkpoint by a selector of one value."""
    selector = {"name": name, "args": {"value": value}}
    return checkpoints.truncate_checkpoint(path, output, selector, **options)


@contextlib.contextmanager
def all_devices() -> Iterator[None]:
    """Runs on all simulated devices instead of one."""
    with jax.default_device(None):
        yield
