"""The benchmarks run, on models of a few numbers."""

import contextlib

import loop_configs
import numpy as np
import pytest
from flax import nnx

from benchmarks import (
    host_time,
    inference,
    input_share,
    penalty_time,
    step_time,
    subjects,
)
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


def test_variants_of_the_step_are_timed(dense):
    """Dense, at full rank and shrunk; the ratio of the first to itself is 1."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    rows = step_time.measure(subject, "^full|parts|shrunk", rounds=2, count=1)
    assert len(rows) == 5
    assert rows["dense"]["ratio"] == rows["dense"]["flops_ratio"] == 1
    assert all(np.isfinite(row["ms"]) and row["mib"] > 0 for row in rows.values())


def test_models_that_are_cut_are_timed(dense):
    """At batch 1 and at the whole one; dense is its own measure."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    figures = inference.measure(subject, rounds=2, calls=1)
    assert figures.keys() == {1, 8}
    for rows in figures.values():
        assert rows["dense"]["of_promise"] == rows["dense"]["macs"] == 1
        macs = [row["macs"] for row in rows.values()]
        assert macs == sorted(macs, reverse=True) and macs[-1] < 0.5


def test_the_time_on_the_host_is_what_calls_take_longer():
    figures = host_time.measure(leaves=20, steps=10, rounds=1)
    assert figures["leaves"] >= 20
    between = figures["called_ms"] - figures["compiled_ms"]
    assert figures["host_ms"] == pytest.approx(between)


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
