"""How a binary ends: mistakes in one line, bugs with their traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from absl import flags

from lowrank_jax.errors import UserError
from train import binary

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/digits_mlp.py"
PROGRAM = '''"""A binary, run with each of several flags.

Importing takes seconds: once is enough, and each run is a fork.
"""
import json, os, sys

from absl import flags
from ml_collections import config_flags
from lowrank_jax.errors import MissingFile, UserError
from train import binary
from train.stopping import Interrupted, NotFinite

flags.DEFINE_string("end", "", "How it ends.")
config_flags.DEFINE_config_file("config", None, "Config.")

def disk():
    with open("/dev/full", "w") as file:
        file.write("0")

def driver():
    try:
        raise ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28']")
    except ValueError as error:
        raise RuntimeError("save failed") from error

def fail(error):
    raise error

ENDS = {
    "": lambda: print("done"),
    "user": lambda: fail(UserError("--rank: must be >= 0, got -1. Raise it.")),
    "missing": lambda: fail(MissingFile("--checkpoint: must be there, got x.")),
    "value": lambda: fail(ValueError("a bug in my model")),
    "file": lambda: fail(FileNotFoundError("a bug in my data")),
    "stopped": lambda: fail(Interrupted("stopped at step 3; run it again.")),
    "nan": lambda: fail(NotFinite("loss: must be finite, got NaN at step 3.")),
    "disk": disk,
    "driver": driver,
}
for name, arguments in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        for stream, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{ending}", os.O_CREAT | os.O_WRONLY), stream)
        os.chdir(os.environ["PYTHONPATH"])
        sys.argv = ["program", *arguments]
        binary.run(lambda: ENDS[flags.FLAGS.end]())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({name: status}), flush=True)
'''
FULL = "disk: must be readable, writable and not full, got 'No space left on device'."
ENDS = {
    "user": "error: --rank: must be >= 0, got -1. Raise it.",
    "missing": "error: --checkpoint: must be there, got x.",
    "stopped": "stopped: stopped at step 3; run it again.",
    "nan": "error: loss: must be finite, got NaN at step 3.",
    "disk": f"error: {FULL} Free some space.",
    "driver": f"error: {FULL} Free some space.",
}
FLAGS = {
    "a misspelled flag": (["--edn=user"], "flags: Unknown command line flag 'edn'"),
    "no flag": (["run"], "flags: must begin with --, got ['run']"),
    "a missing config": (
        ["--config=configs/none.py"],
        "--config: must be a config file, got configs/none.py, which is not there",
    ),
    "a misspelled key": (
        [CONFIG, "--config.sede=1"],
        "--config.sede: must be one of ['checkpoint_every_epochs', ",
    ),
    "a key of a phase": (
        [CONFIG, "--config.phases[0].nme=1"],
        "--config.phases[0].nme: must be one of ['name', 'on_end', ",
    ),
    "a phase that is not there": (
        [CONFIG, "--config.phases[7].name=x"],
        "--config.phases[7].name: must be one of [0], got 7",
    ),
    "a value of another type": ([CONFIG, "--config.seed=abc"], "flags: flag --con"),
    "an argument of the config": (
        ["--config={folder}/mistaken.py"],
        "config argument: must be 'smoke', got 'smok'.",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("binary")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "syntax.py").write_text("def get_config(:\n")
    (folder / "buggy.py").write_text("def get_config():\n    return {}['x']\n")
    (folder / "value.py").write_text("def get_config():\n    return int('x')\n")
    (folder / "mistaken.py").write_text(
        "from lowrank_jax.errors import UserError\ndef get_config():\n"
        "    raise UserError(\"config argument: must be 'smoke', got 'smok'.\")\n"
    )
    return folder


def run_all(folder: Path, cases: dict[str, list[str]]) -> dict[str, tuple]:
    """Status, stdout and stderr of the program with each of several flags."""
    numbered = {str(n): arguments for n, arguments in enumerate(cases.values())}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", folder / "program.py"],
        input=json.dumps(numbered).replace("{folder}", str(folder)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = {}
    for name, line in zip(cases, done.stdout.splitlines(), strict=True):
        ((number, status),) = json.loads(line).items()
        texts = (folder / f"{number}.{ending}" for ending in ("out", "err"))
        results[name] = status, *(text.read_text() for text in texts)
    for file in (*folder.glob("*.out"), *folder.glob("*.err")):
        file.unlink()
    return results


def test_mistakes_end_in_one_line(folder):
    """Of whatever kind; exit status 1 and nothing on stdout."""
    cases = {name: [f"--end={name}"] for name in ENDS}
    cases |= {name: arguments for name, (arguments, _) in FLAGS.items()}
    expected = ENDS | {name: f"error: {text}" for name, (_, text) in FLAGS.items()}
    for name, (status, out, err) in run_all(folder, cases).items():
        assert (status, out) == (1, ""), name
        (line,) = err.splitlines()
        assert line.startswith(expected[name]), name


def test_bugs_keep_their_traceback(folder):
    """Also those in a config file; `--verbosity=1` shows it for mistakes too."""
    cases = {
        "ValueError: a bug in my model": ["--end=value"],
        "FileNotFoundError: a bug in my data": ["--end=file"],
        "SyntaxError: invalid syntax": ["--config={folder}/syntax.py"],
        "KeyError: 'x'": ["--config={folder}/buggy.py"],
        "ValueError: invalid literal": ["--config={folder}/value.py"],
        "error: --rank: must be": ["--end=user", "--verbosity=1"],
    }
    for text, (status, _, err) in run_all(folder, cases).items():
        assert status == 1
        assert "Traceback (most recent call last):" in err, text
        assert any(line.startswith(text) for line in err.splitlines()), text


def test_a_bug_of_a_users_model(tmp_path):
    """Its ValueError is no mistake in the config: the traceback leads to its line, and
    a note says where it came up. A mistake in the config is a line, and with
    --verbosity=1 has its traceback too."""
    config = "--config=tests/own_package/config.py:smoke"
    train = ("train.main", config, f"--workdir={tmp_path / 'run'}")
    name = "--config.model.name=own_package.model"
    ended = commands.run(
        {
            "bug": (*train, f"{name}:buggy"),
            "verbose bug": (*train, f"{name}:buggy", "--verbosity=1"),
            "mistake": (*train, f"{name}:bugy"),
            "verbose mistake": (*train, f"{name}:bugy", "--verbosity=1"),
        }
    )
    for name in ("bug", "verbose bug"):
        status, _, err = ended[name]
        assert status == 1 and "Traceback (most recent call last):" in err
        assert "own_package/model.py" in err
        lines = err.splitlines()
        assert "ValueError: a bug of this model" in lines
        assert any("check of config.phases[0] (prefixes)" in line for line in lines)
    mistake = "error: config.model: name: must be the import path of a function, got"
    assert ended["mistake"].message.startswith(mistake)
    status, _, err = ended["verbose mistake"]
    assert status == 1 and "Traceback (most recent call last):" in err
    assert err.splitlines()[-1] == ended["mistake"].message
    assert not (tmp_path / "run").exists()


def test_help_ends_well(folder):
    """It says where the keys of a config stand, and lists those of a given one."""
    cases = {
        "alone": ["--help"],
        "short": ["--helpshort"],
        "config": [CONFIG, "--help"],
        "done": ["--end="],
    }
    results = run_all(folder, cases)
    assert [status for status, _, _ in results.values()] == [0, 0, 0, 0]
    for name in ("alone", "short", "config"):
        assert "Config keys stand in the file" in results[name][1]
    assert "--config.data.name='digits'" in results["config"][1]
    assert results["done"][1] == "done\n"


def test_flags_that_would_be_ignored():
    """A flag without the one it acts with is refused; all of them at once."""
    values = flags.FlagValues()
    flags.DEFINE_integer("batches", 50, "", flag_values=values)
    flags.DEFINE_string("plot", None, "", flag_values=values)
    flags.DEFINE_list("fractions", None, "", flag_values=values)
    flags.DEFINE_bool("recalibrate", False, "", flag_values=values)
    needs = {"batches": ("fractions", "recalibrate"), "plot": ("fractions",)}

    def check(*arguments: str) -> None:
        values.unparse_flags()
        for name in values:
            values[name].unparse()
        values(["program", *arguments])
        binary.check_companions(values, needs)

    check()
    check("--fractions=1", "--batches=3", "--plot=x")
    check("--recalibrate", "--batches=3")
    with pytest.raises(UserError) as caught:
        check("--batches=3", "--plot=x", "--norecalibrate")
    assert str(caught.value).splitlines() == [
        "--batches: acts only with --fractions or --recalibrate, got 3 alone. Add one,"
        " or drop it.",
        "--plot: acts only with --fractions, got 'x' alone. Add one, or drop it.",
    ]
