"""The benchmarks run, on models of a few numbers."""

import contextlib

import jax
import jax.numpy as jnp
import loop_configs
import numpy as np
import pytest
from flax import nnx

from benchmarks import input_share, penalty_time, step_time
from lowrank_jax import factorize
from lowrank_jax.penalties import PENALTIES
from train import start
from train.models import mlp


@pytest.fixture(scope="module")
def dense() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return mlp.build(image_shape=(4, 4, 1), num_classes=10, rngs=rngs, hidden=(6,))


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_timed(dense, name):
    """Its arguments fit it, and value and gradient are computed."""
    model = factorize(dense, [(".*", {"with_s": True})])
    arguments = penalty_time.arguments(model)
    assert arguments.keys() == PENALTIES.keys()
    assert penalty_time.make_timer(model, name, arguments[name])() > 0


def test_every_variant_of_the_step_is_timed(dense):
    """Dense, at full rank and shrunk; the ratio of the first to itself is 1."""
    task, batch = step_time.images((4, 4, 1), 5)
    timers = {
        name: step_time.make_timer(
            jax.tree.map(jnp.copy, model), sampler, task, jax.device_put(batch)
        )
        for name, (model, sampler) in step_time.variants(dense).items()
    }
    figures = step_time.measure(timers, rounds=2, count=1)
    assert figures["dense"]["ratio_to_dense"] == 1
    assert all(np.isfinite(row["ms"]) for row in figures.values())


def test_the_wait_for_batches_is_a_share(tmp_path):
    """Between nothing and all of a step's time."""
    config = loop_configs.make_config(loop_configs.phase(3))
    with contextlib.ExitStack() as resources:
        session, _ = start.start_run(config, tmp_path / "run", resources)
        batches = resources.enter_context(
            contextlib.closing(session.run.batches_from(0))
        )
        figures = input_share.share_of(session, batches, 2)
    assert 0 <= figures["waiting"] < 1
    assert figures["step_ms"] > 0
    assert input_share.batch_alone(session.run, 2) > 0
