"""Metrics survive a resume, stdout carries one line of JSON, tables line up."""

import doctest
import json

import jax.numpy as jnp
import numpy as np
import pytest

from train.report import logs
from train.report.pace import Pace
from train.stopping import NotFinite


def read(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_metrics_are_flattened_and_plain(tmp_path):
    writer = logs.MetricWriter(tmp_path, start_step=0)
    writer.write(1, {"train": {"loss": jnp.float32(0.5), "rank": np.int64(3)}})
    writer.write(2, {"loss": float("nan"), "phase": "prune"})
    writer.close()
    assert read(tmp_path) == [
        {"step": 1, "train/loss": 0.5, "train/rank": 3},
        {"step": 2, "loss": None, "phase": "prune"},
    ]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()


def test_resuming_drops_later_and_broken_lines(tmp_path):
    writer = logs.MetricWriter(tmp_path, start_step=0)
    for step in range(5):
        writer.write(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "lo')
    writer = logs.MetricWriter(tmp_path, start_step=2)
    writer.write(3, {"loss": 30})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    writer = logs.MetricWriter(tmp_path, start_step=0)
    with pytest.raises(TypeError, match="model"):
        writer.write(1, {"model": object()})
    with pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2})
    writer.close()
    assert read(tmp_path) == []


def test_step_metrics_are_means_at_the_rate_of_training_alone(tmp_path, monkeypatch):
    now, pace = [0.0], Pace()
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    writer = logs.MetricWriter(tmp_path, start_step=0)
    metrics = logs.StepMetrics(writer, batch_size=10, pace=pace)
    for step, seconds in enumerate((60, 61, 62, 63), start=1):  # the first compiles
        now[0] = seconds
        metrics.add(step, {"loss": jnp.float32(step)})
        pace.go(step)
    assert metrics.flush() == "loss 2.5000"
    pace.stop(4)
    now[0] = 100.0
    metrics.add(5, {"loss": 1.0})
    metrics.flush()
    writer.close()
    assert read(tmp_path) == [
        {"step": 4, "train/loss": 2.5, "train/examples_per_s": 10.0},
        {"step": 5, "train/loss": 1.0},
    ]
    assert metrics.flush() == ""


@pytest.mark.parametrize(
    "saved, said",
    [(None, "no checkpoint was saved before"), (4, "the last checkpoint is of step 4")],
)
def test_a_loss_that_is_not_finite(tmp_path, saved, said):
    """The steps are named, and a checkpoint only if there is one."""
    writer = logs.MetricWriter(tmp_path, start_step=0)
    metrics = logs.StepMetrics(writer, batch_size=10, saved_step=saved)
    for step, loss in ((6, 1.0), (7, float("nan")), (8, float("inf"))):
        metrics.add(step, {"loss": loss})
    with pytest.raises(NotFinite, match="at step 7 to 8.*learning_rate") as caught:
        metrics.flush()
    writer.close()
    assert str(caught.value).startswith("loss: must be finite, got NaN")
    assert str(caught.value).endswith(f"{said}.")
    assert read(tmp_path) == []


@pytest.mark.parametrize("loss, place", [(1.0, "gradient"), (jnp.nan, "loss")])
def test_a_gradient_that_is_not_finite(tmp_path, loss, place):
    """The parameter of the first bad step is named, whether or not the loss is bad."""
    writer = logs.MetricWriter(tmp_path, start_step=0)
    metrics = logs.StepMetrics(writer, batch_size=10, names=("head/u", "head/v"))
    for step, index in ((6, -1), (7, 1), (8, 0)):
        metrics.add(step, {"loss": loss, logs.NONFINITE_GRADIENT: jnp.int32(index)})
    with pytest.raises(NotFinite) as caught:
        metrics.flush()
    first = 7 if place == "gradient" else 6
    whose = " (first gradient that is not finite: head/v)" if first == 7 else ""
    assert str(caught.value).startswith(
        f"{place}: must be finite, got NaN or infinity at step {first} to 8{whose}."
    )
    writer.close()


def test_the_parameter_of_a_gradient_is_no_figure(tmp_path):
    """It stays out of the means, in any order of shrinks that change the names."""
    writer = logs.MetricWriter(tmp_path, start_step=0)
    metrics = logs.StepMetrics(writer, batch_size=10, names=("a",))
    metrics.add(1, {"loss": 1.0, logs.NONFINITE_GRADIENT: -1})
    metrics.flush()
    metrics.names = ("b", "c")
    metrics.add(2, {"loss": 1.0, logs.NONFINITE_GRADIENT: 1})
    with pytest.raises(NotFinite, match=r"\(first gradient that is not finite: c\)"):
        metrics.flush()
    writer.close()
    assert read(tmp_path) == [{"step": 1, "train/loss": 1.0}]


def test_emit_prints_one_line_of_json(capsys):
    logs.emit(
        {
            "accuracy": np.float32(0.5),
            "loss": jnp.inf,
            "ranks": {"up": np.arange(2)},
            "done": np.bool_(True),
        }
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "accuracy": 0.5,
        "loss": None,
        "ranks": {"up": [0, 1]},
        "done": True,
    }


def test_table_lines_up():
    assert doctest.testmod(logs).failed == 0
    text = logs.table(
        ["layer", "MACs", "kept"], [["up", 1234567, 0.123456], ["down", 8, None]]
    )
    header, rule, *rows = text.splitlines()
    assert rule == "-----  ---------  ------"
    assert rows == ["up     1,234,567  0.1235", "down           8       -"]
    with pytest.raises(ValueError, match="3 cells"):
        logs.table(["a", "b", "c"], [[1, 2]])
