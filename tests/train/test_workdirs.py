"""Workdirs that are there already: gone on with, or refused and left unchanged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_mistakes import make_config, named
from support import assert_same_checkpoints, contents, put

from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from train import folders, loop
from train.config import to_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the good config."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    loop.train_and_evaluate(make_config(), workdir)
    return workdir


def test_a_run_of_another_config(finished):
    """Every difference is listed, with both values; the run stays as it is."""
    before, config = contents(finished), make_config()
    put(config, "seed", 1)
    put(config, "model/args/hidden", [5])
    put(config, "phases/0/optimizer/learning_rate", 0.2)
    with pytest.raises(ValueError) as caught:
        loop.train_and_evaluate(config, finished)
    message = str(caught.value)
    for part in ("--workdir", "config.seed: 0 there, 1 here", "[4] there, [5] here"):
        assert part in message
    assert "learning_rate" in message and "0.1" in message and "0.2" in message
    assert "batch_size" not in message  # what does not differ
    assert contents(finished) == before


def test_a_sampler_that_changed_its_rungs(tmp_path):
    """The rung is named, before anything runs."""
    theirs, ours = make_config(), make_config()
    for config, rung in ((theirs, 0.25), (ours, 0.125)):
        put(config, "phases/0/sampler", named("strata", fractions=[[0.5, rung]]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(to_json(theirs)))
    with pytest.raises(UserError) as caught:
        loop.train_and_evaluate(ours, tmp_path / "run")
    rung = "sampler.args.fractions: [[0.5, 0.25]] there, [[0.5, 0.125]] here"
    assert rung in str(caught.value)


def test_a_workdir_that_cannot_be_written(tmp_path):
    """Before the data are read: these are not there."""
    if not Path("/proc").is_dir():
        pytest.skip("only on Linux")
    config = make_config()
    put(config, "data/name", "no_such_package_h7:data")
    with pytest.raises(UserError, match="--workdir: must be a place that can be wri"):
        loop.train_and_evaluate(config, Path("/proc/run"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_text("mine"), "must be in a folder"),
        (lambda path: (path.mkdir(), (path / "a").write_text("mine")), "other files"),
    ],
    ids=["a file", "foreign files"],
)
def test_a_workdir_that_is_taken(tmp_path, make: Callable[[Path], Any], message: str):
    path = tmp_path / "run"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"--workdir.*{message}"):
        loop.train_and_evaluate(make_config(), path)
    assert contents(tmp_path) == before


def damaged_copy(finished: Path, target: Path, step: int) -> Path:
    """A run whose only complete checkpoint is 4, with a half-written one beside it."""
    shutil.copytree(finished, target)
    half = target / "checkpoints" / str(step)
    shutil.copytree(target / "checkpoints/4", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(half / "params")
    return target


def test_a_half_written_checkpoint_alone(finished, tmp_path):
    """It counts for nothing: the run begins anew, and ends as it did."""
    workdir = damaged_copy(finished, tmp_path / "run", 2)
    shutil.rmtree(workdir / "checkpoints/4")
    assert loop.train_and_evaluate(make_config(), workdir)["step"] == 4
    assert_same_checkpoints(
        checkpoint.open_checkpoint(workdir), checkpoint.open_checkpoint(finished)
    )


def test_a_half_written_checkpoint_of_a_step_to_come(finished, tmp_path, capsys):
    """It is named, and makes room for the step when the run comes to it again."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "checkpoints/4/metadata/metadata").unlink()
    assert loop.train_and_evaluate(make_config(), workdir)["step"] == 4
    assert "checkpoints/4 was not written to its end; it is now" in (
        capsys.readouterr().err
    )
    assert (workdir / "checkpoints/4.damaged").is_dir()
    assert_same_checkpoints(
        checkpoint.open_checkpoint(workdir), checkpoint.open_checkpoint(finished)
    )


def test_a_half_written_checkpoint_beside_a_complete_one(finished, tmp_path):
    """The complete one counts; the other is set aside."""
    workdir = damaged_copy(finished, tmp_path / "run", 5)
    assert checkpoint.open_checkpoint(workdir).step == 4
    result = loop.train_and_evaluate(make_config(), workdir)
    assert result["step"] == 4
    assert (workdir / "checkpoints/5.damaged").is_dir()


def test_a_run_that_goes_on_elsewhere(finished):
    """Its owner is named, and nothing is touched."""
    before = contents(finished)
    with folders.lock(finished):
        with pytest.raises(UserError) as caught:
            loop.train_and_evaluate(make_config(), finished)
        assert contents(finished).keys() - before.keys() == {folders.LOCK}
    assert str(caught.value).startswith(
        f"--workdir: must be of one run at a time, got {finished}, which process"
        f" {os.getpid()} on "
    )
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["config.json", ".config.json.partial", ".lock"])
def test_a_start_that_was_cut_off(tmp_path, name):
    """A kill before the first checkpoint leaves nothing that is in the way."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / name).write_text('{"seed"')
    assert loop.train_and_evaluate(make_config(), workdir)["step"] == 4
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "tensorboard",
    } | {name} - {folders.LOCK, ".config.json.partial"}


def test_a_damaged_config_of_a_run_that_has_checkpoints(finished, tmp_path):
    """It is not overwritten: nobody knows what the checkpoints are of."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "config.json").write_text('{"seed"')
    before = contents(workdir)
    with pytest.raises(UserError, match="--workdir: .*config.json: must be JSON, got"):
        loop.train_and_evaluate(make_config(), workdir)
    assert contents(workdir) == before


def test_a_checkpoint_that_was_being_replaced(finished, tmp_path):
    """Killed between the former one and the new one: the former counts again; after
    the new one, that counts."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    folders.make_way(workdir / "checkpoints/4")
    assert [path.name for path in (workdir / "checkpoints").iterdir()].count("4") == 0
    assert loop.train_and_evaluate(make_config(), workdir)["step"] == 4
    arrays = contents(workdir / "checkpoints/4")
    assert arrays == contents(finished / "checkpoints/4")
    (workdir / "checkpoints/.4.aside").mkdir()
    folders.put_back(workdir / "checkpoints")
    assert contents(workdir / "checkpoints/4") == arrays
    assert not (workdir / "checkpoints/.4.aside").exists()
