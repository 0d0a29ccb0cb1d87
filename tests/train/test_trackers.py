"""Where metrics go: what a resume, a full disk and a missing package do to each."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from lowrank_jax.errors import UserError
from train.report import logs, trackers

FAKE_WANDB = '''
"""Stands in for the package: notes what it is told in a file of the run's folder."""
import json, pathlib


def init(**options):
    return Run(options)


class Run:
    def __init__(self, options):
        self.file = pathlib.Path(options["dir"], "told.jsonl")
        self.tell({"init": options})

    def tell(self, value):
        with self.file.open("a") as file:
            file.write(json.dumps(value) + "\\n")

    def log(self, values, step):
        self.tell({"step": step, **values})

    def finish(self):
        self.tell("finish")
'''


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show: the files in their order, each with its first step.

    A record is its length, a checksum, an event, a checksum.
    """
    found: dict[tuple[str, int], float] = {}
    files = (workdir / "tensorboard").iterdir()
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {key: v for key, v in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_every_step_once(tmp_path):
    """Attempts within one second have files of their own, even in one process."""
    for start, loss in ((0, 1.0), (2, 2.0)):
        writer = logs.MetricWriter(tmp_path, start_step=start)
        for step in range(start + 1, 5):
            writer.write(step, {"train": {"loss": loss, "phase": "prune"}})
        writer.close()
    assert scalars(tmp_path) == {
        ("train/loss", 1): 1.0,
        ("train/loss", 2): 1.0,
        ("train/loss", 3): 2.0,
        ("train/loss", 4): 2.0,
    }


def test_an_evaluation_that_is_done_anew_is_there_once(tmp_path):
    """It came after the checkpoint of its step, and a kill after it."""
    train, validation = {"train": {"loss": 1.0}}, {"validation": {"loss": 2.0}}
    for start in (0, 1, 1):
        writer = logs.MetricWriter(tmp_path, start_step=start)
        if not start:
            writer.write(1, train)
        writer.write(1, validation)
        writer.write(2, train)
        writer.write(2, validation)
        writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line).items()) for line in lines] == [
        [("step", 1), ("train/loss", 1.0)],
        [("step", 1), ("validation/loss", 2.0)],
        [("step", 2), ("train/loss", 1.0)],
        [("step", 2), ("validation/loss", 2.0)],
    ]


def test_lines_that_a_kill_left_broken(tmp_path):
    """Cut in the middle, in a character, with something else in them: dropped."""
    good = [{"step": step, "loss": step} for step in range(4)]
    text = "".join(json.dumps(line) + "\n" for line in good[:3])
    for broken in (b'{"step": 3, "lo', b"\xff\n", b"3\n", b'{"loss": 3}\n', b"\n"):
        (tmp_path / "metrics.jsonl").write_bytes(text.encode() + broken)
        writer = logs.MetricWriter(tmp_path, start_step=2)
        writer.write(3, {"loss": 3})
        writer.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == good


def test_a_full_disk_is_met_where_the_metrics_are_written(small_disk):
    """At once, with the file's name; the lines before are whole, and closing does not
    try again; a run that resumes with room writes on."""
    writer = logs.MetricWriter(small_disk.folder, start_step=0)
    writer.write(1, {"loss": 1.0})
    small_disk.fill()
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl") as caught:
        writer.write(2, {"loss": 2.0, "text": "more than the last page has" * 1000})
    assert caught.value.filename.endswith("metrics.jsonl")
    small_disk.empty()
    writer.close()
    writer = logs.MetricWriter(small_disk.folder, start_step=1)
    writer.write(2, {"loss": 2.0})
    writer.close()
    lines = (small_disk.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}']


def test_a_tracker_of_ones_own(tmp_path):
    """It is opened with the run, told plain values, and closed."""
    told: list[Any] = []

    class Mine:
        def __init__(self, workdir: Path, config: Mapping[str, Any], start_step: int):
            told.append((workdir, config, start_step))

        def write(self, step: int, flat: Mapping[str, Any]) -> None:
            told.append((step, flat))

        def close(self) -> None:
            told.append("closed")

    config = {"seed": 3}
    writer = logs.MetricWriter(tmp_path, start_step=4, config=config, further=[Mine])
    writer.write(5, {"train": {"loss": jnp.float32(0.5)}})
    writer.close()
    assert told == [(tmp_path, config, 4), (5, {"train/loss": 0.5}), "closed"]


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    workdir = tmp_path / "run"
    for start in (0, 1):
        writer = logs.MetricWriter(
            workdir,
            start_step=start,
            config={"seed": 3},
            further=[trackers.wandb("digits")],
        )
        writer.write(start + 1, {"train": {"loss": 0.5}})
        writer.close()
    lines = (workdir / "told.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    first, *rest = [line["init"] for line in told if "init" in line]
    assert rest == [first] and len(first["id"]) == 8
    assert first == {
        "project": "digits",
        "id": (workdir / "wandb_id").read_text(),
        "resume": "allow",
        "config": {"seed": 3},
        "dir": str(workdir),
    }
    assert [told[1], told[2]] == [{"step": 1, "train/loss": 0.5}, "finish"]
    sys.modules.pop("wandb", None)


def test_wandb_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="--wandb: must have .* got 'digits' without"):
        trackers.wandb("digits")
