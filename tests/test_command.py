"""The command `lowrank`: what it lists and refuses, and that a binary is a binary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from messages import check_form

import lowrank_command as command
from lowrank_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_the_commands_are_listed(capsys):
    """With a line for each, by no argument and by --help, as something that went
    well."""
    for arguments in ([], ["--help"]):
        command.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        for name, (_, about) in command.COMMANDS.items():
            assert any(f"lowrank {name}" in line and about in line for line in lines)


def test_every_command_is_a_binary_of_the_clone():
    for name, (module, _) in command.COMMANDS.items():
        assert command.find_module(name, ROOT) == module


def test_a_misspelled_command_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["trian"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: lowrank: must be a command, got 'trian'. Did you mean 'train'?\n"
    )
    with pytest.raises(UserError) as caught:
        command.find_module("x", ROOT)
    check_form(str(caught.value))
    assert all(repr(name) in str(caught.value) for name in command.COMMANDS)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """The repository, or what its binaries import."""
    with pytest.raises(UserError) as caught:
        command.find_module("train", tmp_path)
    check_form(str(caught.value))
    monkeypatch.setitem(sys.modules, "ml_collections", None)  # as if not installed
    with pytest.raises(UserError) as caught:
        command.find_module("status", ROOT)
    check_form(str(caught.value))
    assert "without ml_collections. Run pip install" in str(caught.value)


def run(folder: Path, *arguments: str) -> str:
    """The output of a Python program that ends well, in a folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOWRANK = ("-c", "from lowrank_command import main; main()")


@pytest.mark.slow
def test_a_command_trains_as_the_binary_does(tmp_path):
    """To the same losses, bit for bit: the flags of XLA are set in time. Config files
    are found from the folder that it is given in."""
    flags = [f"--config={ROOT / 'configs/digits_mlp.py'}:smoke", "--workdir=run"]
    results = []
    for folder, program in (("here", LOWRANK), ("there", ("-m", "train.main"))):
        (tmp_path / folder).mkdir()
        name = ["train"] if program is LOWRANK else []
        out = run(tmp_path / folder, *program, *name, *flags)
        metrics = (tmp_path / folder / "run" / "metrics.jsonl").read_text()
        lines = map(json.loads, metrics.splitlines())
        losses = [
            {k: v for k, v in line.items() if "loss" in k or "accuracy" in k}
            for line in lines
        ]
        results.append((json.loads(out.splitlines()[-1]), losses))
    (one, losses), (other, others) = results
    assert one == other and losses == others and any(losses)


def test_help_is_that_of_the_binary(tmp_path):
    """Flags go on as they are, and absl shows those of the binary."""
    helped = run(tmp_path, *LOWRANK, "evaluate", "--help")
    assert helped == run(ROOT, "-m", "train.evaluate", "--help")
    assert "--rank_fractions" in helped
