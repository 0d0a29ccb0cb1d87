"""How a binary ends: mistakes in one line, bugs with their traceback."""

import commands
import pytest
from absl import flags

from lowrank_jax.errors import UserError
from train import binary
from train.meanings import MEANINGS

CONFIG = "--config=configs/digits_mlp.py"
ENDING = "own_package.ending"
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
    "a misspelled flag": (
        ["--edn=user"],
        "--edn: must be a flag of this program, got '--edn'. Did you mean '--end'?",
    ),
    "no flag": (["run"], "flags: must begin with --, got ['run']"),
    "a misspelled config": (
        ["--config=configs/nestde.py"],
        "--config: must be a config file, got configs/nestde.py, which is not there."
        " Did you mean 'configs/nested.py'?",
    ),
    "a config of another folder": (
        ["--config=config/maestro.py"],
        "--config: must be a config file, got config/maestro.py, which is not there."
        " Did you mean 'configs/maestro.py'?",
    ),
    "a missing config": (
        ["--config=configs/zzzzzz.py"],
        "--config: must be a config file, got configs/zzzzzz.py, which is not there."
        " Correct the path.",
    ),
    "a misspelled key": (
        [CONFIG, "--config.sede=1"],
        "--config.sede: must be a key of the config, got 'sede'. Did you mean 'seed'?",
    ),
    "a key of a phase": (
        [CONFIG, "--config.phases[0].nme=1"],
        "--config.phases[0].nme: must be a key of the config, got 'nme'. Did you mean"
        " 'name'?",
    ),
    "a key like no other": (
        [CONFIG, "--config.data.qqq=1"],
        "--config.data.qqq: must be a key of the config, one of 'args', 'batch_size',"
        " 'data_dir', 'eval_batch_size', 'name', 'train_examples',"
        " 'validation_examples', got 'qqq'. Choose one.",
    ),
    "a phase that is not there": (
        [CONFIG, "--config.phases[7].name=x"],
        "--config.phases[7].name: must be a key of the config, one of 0, got 7",
    ),
    "a key below a value": (
        [CONFIG, "--config.data.name.first=x"],
        "--config.data.name.first: must be a key of the config, one of none, got",
    ),
    "a misspelled argument of a config": (
        ["--config=configs/nested.py:smok"],
        "config argument: must be a name that the config takes, got 'smok'. Did you"
        " mean 'smoke'?",
    ),
    "an argument like no other": (
        ["--config=configs/bsr.py:zzz"],
        "config argument: must be a name that the config takes, one of 'smoke',"
        " 'cifar10', 'fraction', 'weight', got 'zzz'. What they mean:"
        " --config=FILE.py:help.",
    ),
    "an argument without its number": (
        ["--config=configs/bsr.py:weight"],
        "config argument: must be written as weight=NUMBER, got 'weight'. Correct it.",
    ),
    "a value of another type": ([CONFIG, "--config.seed=abc"], "flags: flag --con"),
    "an argument of the config": (
        ["--config={folder}/mistaken.py"],
        "config argument: must be 'smoke', got 'smok'.",
    ),
}


BUGS = {
    "ValueError: a bug in my model": ["--end=value"],
    "FileNotFoundError: a bug in my data": ["--end=file"],
    "SyntaxError: invalid syntax": ["--config={folder}/syntax.py"],
    "KeyError: 'x'": ["--config={folder}/buggy.py"],
    "ValueError: invalid literal": ["--config={folder}/value.py"],
    "error: --rank: must be": ["--end=user", "--verbosity=1"],
}
HELP = {
    "help alone": ["--help"],
    "short help": ["--helpshort"],
    "help of a config": [CONFIG, "--help"],
    "arguments": ["--config=configs/bsr.py:help"],
    "done": ["--end="],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, commands.Ended]:
    """Every command of this file."""
    folder = tmp_path_factory.mktemp("binary")
    (folder / "syntax.py").write_text("def get_config(:\n")
    (folder / "buggy.py").write_text("def get_config():\n    return {}['x']\n")
    (folder / "value.py").write_text("def get_config():\n    return int('x')\n")
    (folder / "mistaken.py").write_text(
        "from lowrank_jax.errors import UserError\ndef get_config():\n"
        "    raise UserError(\"config argument: must be 'smoke', got 'smok'.\")\n"
    )
    cases = {name: [f"--end={name}"] for name in ENDS}
    cases |= {name: arguments for name, (arguments, _) in FLAGS.items()}
    cases |= BUGS | HELP
    runs = {
        name: (ENDING, *(word.replace("{folder}", str(folder)) for word in arguments))
        for name, arguments in cases.items()
    }
    config = "--config=tests/own_package/config.py:smoke"
    train = ("train.main", config, f"--workdir={folder / 'run'}")
    for model in ("buggy", "bugy"):
        name = f"--config.model.name=own_package.model:{model}"
        runs[model] = (*train, name)
        runs[f"verbose {model}"] = (*train, name, "--verbosity=1")
    results = commands.run(runs)
    assert not (folder / "run").exists()
    return results


def test_mistakes_end_in_one_line(ended):
    """Of whatever kind; exit status 1 and nothing on stdout. What is to be started
    again ends with 75."""
    expected = ENDS | {name: f"error: {text}" for name, (_, text) in FLAGS.items()}
    for name, message in expected.items():
        status, out, err = ended[name]
        assert (status, out) == (75 if name == "stopped" else 1, ""), name
        assert len(err.splitlines()) == 1 and err.startswith(message), name


def test_bugs_keep_their_traceback(ended):
    """Also those in a config file; `--verbosity=1` shows it for mistakes too."""
    for text in BUGS:
        status, _, err = ended[text]
        assert status == 1
        assert "Traceback (most recent call last):" in err, text
        assert any(line.startswith(text) for line in err.splitlines()), text


def test_a_bug_of_a_users_model(ended):
    """Its ValueError is no mistake in the config: the traceback leads to its line, and
    a note says where it came up. A mistake in the config is a line, and with
    --verbosity=1 has its traceback too."""
    for name in ("buggy", "verbose buggy"):
        status, _, err = ended[name]
        assert status == 1 and "Traceback (most recent call last):" in err
        assert "own_package/model.py" in err
        lines = err.splitlines()
        assert "ValueError: a bug of this model" in lines
        assert any("check of config.phases[0] (prefixes)" in line for line in lines)
    mistake = "error: config.model: name: must be the import path of a function, got"
    assert ended["bugy"].message.startswith(mistake)
    status, _, err = ended["verbose bugy"]
    assert status == 1 and "Traceback (most recent call last):" in err
    assert ended["bugy"].message in err.splitlines()  # JAX says good-bye after it


def test_help_ends_well(ended):
    """On stdout, status 0: examples, own flags, each config key with its meaning, or
    those of a given config with their values and its arguments."""
    assert [ended[name][::2] for name in HELP] == [(0, "")] * len(HELP)
    assert ended["help alone"].out == ended["short help"].out
    lines = ended["help alone"].out.splitlines()
    assert (
        lines[0] == "A binary that ends in each of several ways, `--end` says in which."
    )
    assert "  python -m own_package.ending --end=user" in lines
    assert "  --end                     What to end with; default user." in lines
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags == ["--end", "--config"]  # none of absl's, of JAX's
    for key, meaning in MEANINGS.items():
        (row,) = [n for n, line in enumerate(lines) if line.split()[:1] == [key]]
        assert " ".join(lines[row:]).split()[1:3] == meaning.split()[:2]
    assert max(map(len, lines)) <= 88
    of_config = ended["help of a config"].out.splitlines()
    assert any(line.startswith("  data.name='digits'") for line in of_config)
    assert "  :smoke              a few steps, to see that it runs" in of_config
    assert ended["arguments"].out.splitlines() == [
        "  :smoke              a few steps, to see that it runs",
        "  :cifar10            ResNet-56 on CIFAR-10",
        "  :fraction=NUMBER    budget, as a share of the dense MACs (default 0.25)",
        "  :weight=NUMBER      of the penalty",
    ]
    assert ended["done"].out == "done\n"


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
