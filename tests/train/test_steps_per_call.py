"""Several steps in one call of the device: the run is the same."""

from typing import Any

import numpy as np
import pytest
from loop_configs import count_traces, make_config, phase, two_phases
from support import (
    assert_same_checkpoints,
    at_step,
    interrupt,
    metric_lines,
    stored_arrays,
)

from configs import common
from lowrank_jax import penalties
from train import loop, session
from train.stopping import NotFinite

CALL = 3
"""Divides neither the 4 steps of an epoch nor the 8 of the first phase."""


def config_of(steps_per_call: int) -> Any:
    """The run of two phases, with shrinking; what is logged is the mean of 12 steps."""
    changes = {"steps_per_call": steps_per_call, "log_every_steps": 12}
    return {**two_phases(), **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    """Workdirs of the run one by one, three by three, and the same stopped twice."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(penalties.PENALTIES, "count_traces", count_traces)
        for name, count in (("single", 1), ("several", CALL)):
            loop.train_and_evaluate(config_of(count), root / name)
        for step in (3, 9):
            interrupt(config_of(CALL), root / "stopped", step)
        loop.train_and_evaluate(config_of(CALL), root / "stopped")
    return {name: root / name for name in ("single", "several", "stopped")}


@pytest.mark.parametrize("step", [4, 8, 12])
def test_the_state_is_that_of_single_steps(runs, step):
    """After the shrink, between the phases, and at the end; to rounding."""
    single, several = (at_step(runs[name], step) for name in ("single", "several"))
    assert several.metadata["ranks"] == single.metadata["ranks"]
    arrays, wanted = stored_arrays(several), stored_arrays(single)
    assert arrays.keys() == wanted.keys()
    for key, array in arrays.items():
        np.testing.assert_allclose(array, wanted[key], atol=1e-4, err_msg=key)


def test_what_is_logged_is_the_mean_of_all_steps(runs):
    lines = {
        name: [x for x in metric_lines(runs[name]) if "train/loss" in x]
        for name in ("single", "several")
    }
    assert len(lines["single"]) == len(lines["several"]) > 1
    for single, several in zip(lines["single"], lines["several"], strict=True):
        assert several["step"] == single["step"]
        for key in single.keys() - {"train/examples_per_s"}:
            assert several[key] == pytest.approx(single[key], abs=1e-4), key


@pytest.mark.parametrize("step", [8, 12])
def test_stopping_leaves_no_trace(runs, step):
    stopped, whole = (at_step(runs[name], step) for name in ("stopped", "several"))
    assert_same_checkpoints(stopped, whole)


def test_calls_hold_nothing_that_is_due(tmp_path, monkeypatch):
    """Epochs end at 4 and 8, something is logged at 5 and 10; what is trained changes
    with the epoch."""
    calls, train_step = [], session.Session.train_step

    def noted(self: Any, step: int, *batches: Any) -> Any:
        calls.append((step, len(batches)))
        return train_step(self, step, *batches)

    monkeypatch.setattr(session.Session, "train_step", noted)
    config = make_config(
        phase(12, trainable=(".*/u", ".*/v")),
        eval_every_epochs=0,
        checkpoint_every_epochs=0,
        steps_per_call=2,
        log_every_steps=5,
    )
    loop.train_and_evaluate(config, tmp_path / "run")
    assert calls == [(0, 2), (2, 2), (4, 1), (5, 1), (6, 2), (8, 2), (10, 2)]


def test_a_loss_that_is_not_finite_is_found_at_its_step(tmp_path):
    """In the middle of a call."""
    adrift = common.optimizer("sgd", learning_rate=1e30)
    config = make_config(
        phase(8, optimizer=adrift),
        eval_every_epochs=0,
        steps_per_call=4,
        log_every_steps=4,
    )
    with pytest.raises(NotFinite, match=r"got NaN or infinity at steps? [23]"):
        loop.train_and_evaluate(config, tmp_path / "run")
