"""Mistakes and damage whose whole line is held to its words, as a user reads it.

Those of flags, files and keys are in test_binary.py and test_command_line.py, of
signals in test_first_minutes.py, of data sets in test_original_files.py.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import support
from config_mistakes import make_config

from lowrank_jax.errors import UserError
from train import config as config_lib
from train import folders, opening, phases, quickstart


def damaged(run: Path, target: Path) -> tuple[Path, str]:
    """A copy of a run with one flipped bit in its parameters, and what is said."""
    shutil.copytree(run, target)
    (step,) = (target / "checkpoints").iterdir()
    file = step / "params/process_0.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = (
        rf"checkpoint {step}: params/process_0\.bin: array \S+: its checksum must be"
        r" [0-9a-f]{8}, got [0-9a-f]{8}\. Use"
    )
    return step, said


def test_a_flipped_bit(run, tmp_path, capsys):
    """File, array and checksum; with a good step beside it, that is taken, and the
    damaged one is named."""
    step, said = damaged(run, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        opening.open_model(tmp_path / "run")
    assert re.fullmatch(f"--checkpoint: {said} another checkpoint.", str(caught.value))
    (whole,) = (run / "checkpoints").iterdir()
    before = shutil.copytree(whole, step.with_name(str(int(step.name) - 1)))
    capsys.readouterr()
    opening.load_latest(tmp_path / "run", allow_imports=[])
    (skipped,) = [x for x in capsys.readouterr().err.splitlines() if "skipped" in x]
    assert re.fullmatch(f"skipped: {said} the one before it, {before}.", skipped)


def test_a_folder_above_a_quickstart(tmp_path):
    """`--workdir=runs`, where runs/quickstart is one."""
    quickstart.clear(tmp_path / "quickstart")
    with pytest.raises(UserError) as caught:
        quickstart.clear(tmp_path)
    assert str(caught.value) == (
        f"must be new or of an earlier quickstart, got {tmp_path}, which holds other"
        " files. Nothing is overwritten; name another."
    )


def test_a_place_that_cannot_be_written():
    with pytest.raises(UserError) as caught:
        folders.check_writable("/proc/run")
    assert str(caught.value) == (
        "must be a place that can be written, got /proc/run (/proc: No such file or"
        " directory). Name another, or mend the disk or its permissions."
    )


CONFIGS: dict[str, tuple[str, Any, str]] = {
    "a misspelled key": (
        "sede",
        1,
        "config: every key must be known, got 'sede'. Did you mean 'seed'?",
    ),
    "a learning rate below 0": (
        "phases/0/optimizer/learning_rate",
        -0.1,
        "config.phases[0] (only): optimizer: learning_rate: must be a finite number of"
        " at least 0, got -0.1. Give one.",
    ),
    "a learning rate of NaN": (
        "phases/0/optimizer/learning_rate",
        math.nan,
        "config.phases[0].optimizer.learning_rate: must be a finite number, got nan."
        " Give one.",
    ),
    "a misspelled sampler": (
        "phases/0/sampler/name",
        "sandwhich",
        "config.phases[0] (only): sampler: name: must be a known name or an import path"
        " 'package.module:function', got 'sandwhich'. Did you mean 'sandwich'?",
    ),
    "a misspelled penalty": (
        "phases/0/penalties",
        [{"name": "hoier", "args": {}}],
        "config.phases[0] (only): penalties: name: must be a known name or an import"
        " path 'package.module:function', got 'hoier'. Did you mean 'hoyer'?",
    ),
    "a misspelled selector": (
        "phases/0/on_end",
        [
            {
                "name": "truncate",
                "args": {"selector": {"name": "knapsak", "args": {}}},
            }
        ],
        "config.phases[0] (only): on_end: selector: name: must be a known name or an"
        " import path 'package.module:function', got 'knapsak'. Did you mean"
        " 'knapsack'?",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_mistake_in_a_config(case):
    place, value, message = CONFIGS[case]
    config = make_config()
    support.put(config, place, value)
    with pytest.raises(UserError) as caught:
        phases.build_phases(config_lib.to_json(config)["phases"])
    lines = str(caught.value).splitlines()
    assert lines == [message]


def test_the_selector_of_a_binary(run, tmp_path):
    """Beside --select of truncate, whose other choices test_command_line.py has."""
    words = (f"--checkpoint={run}", f"--output={tmp_path / 'cut'}", "--macs=0.5")
    ended = commands.run({"cut": ("train.truncate", *words, "--select=knapsak")})
    assert ended["cut"].message == (
        "error: selector: name: must be a known name or an import path"
        " 'package.module:function', got 'knapsak'. Did you mean 'knapsack'?"
    )
