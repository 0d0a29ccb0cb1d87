"""Malformed command lines: one line on stderr, status 1, nothing written."""

import json

import commands
import mutations
import pytest
import support

CONFIG = "--config=configs/digits_mlp.py:smoke"


def is_refusal(ended: commands.Ended) -> bool:
    """Whether a command ended in one line that says what is wrong."""
    lines = ended.lines
    one_line = (ended.status, ended.out, len(lines)) == (1, "", 1)
    return one_line and lines[0].startswith("error: ")


@pytest.mark.slow  # tests/train/test_binary.py has one of each kind in every run
def test_malformed_command_lines(tmp_path):
    """Each binary refuses each of these before it makes anything."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "ranks.json").write_text('{"head": 1, "head": 2}')
    (files / "deep.json").write_text("[" * 100_000)
    (files / "latin.json").write_bytes(b'{"h\xe9ad": 1}')
    (files / "config.py").write_text("def get_config(arg=''):\n  return 3\n")
    (files / "empty.py").write_text("")
    before = support.contents(files)
    new = tmp_path / "new"
    train, cut = "train.main", "train.truncate"
    judge, write = "train.evaluate", "train.generate"
    workdir, output = f"--workdir={new}", f"--output={new}"
    there = f"--checkpoint={files}"
    args = json.dumps(mutations.nested(300))
    lines = {
        "no flags": (train,),
        "no workdir": (train, CONFIG),
        "an empty workdir": (train, CONFIG, "--workdir="),
        "a file for a workdir": (train, CONFIG, f"--workdir={files}/empty.py"),
        "a workdir of other things": (train, CONFIG, f"--workdir={files}"),
        "a config that is not there": (train, "--config=nope.py", workdir),
        "a config without a config": (
            train,
            f"--config={files}/empty.py",
            workdir,
        ),
        "a config that is a number": (
            train,
            f"--config={files}/config.py",
            workdir,
        ),
        "an unknown key": (train, CONFIG, workdir, "--config.sede=1"),
        "a wrong type": (train, CONFIG, workdir, "--config.seed=much"),
        "an index too high": (train, CONFIG, workdir, "--config.phases[7].name=x"),
        "a number too large": (train, CONFIG, workdir, f"--config.seed={10**30}"),
        "too many passes": (
            train,
            CONFIG,
            workdir,
            "--config.phases[0].sampler.args.passes=1000000",
        ),
        "too wide a model": (
            train,
            CONFIG,
            workdir,
            "--config.model.args.hidden=(2000000000, 2000000000)",
        ),
        "a pattern without an end": (
            train,
            CONFIG,
            workdir,
            "--config.phases[0].optimizer.decayed=(.*)*x",
        ),
        "a word": (train, CONFIG, workdir, "smoke"),
        "no checkpoint": (judge, f"--checkpoint={new}"),
        "a folder that is none": (judge, there),
        "fractions that are words": (judge, there, "--rank_fractions=a,b"),
        "no prompt": (write, there),
        "a file of no prompts": (write, there, f"--prompts_file={files}/empty.py"),
        "prompts in another code": (
            write,
            there,
            f"--prompts_file={files}/latin.json",
        ),
        "a temperature below 0": (write, there, "--prompt=a", "--temperature=-1"),
        "a temperature of none": (write, there, "--prompt=a", "--temperature=nan"),
        "two ways to write": (write, there, "--prompt=a", "--rank=1", "--ranks=x"),
        "two ways to cut": (cut, there, output, "--rank=1", "--energy=0.5"),
        "a rank that is text": (cut, there, output, "--rank=a"),
        "a rank twice": (cut, there, output, f"--ranks={files}/ranks.json"),
        "ranks without an end": (cut, there, output, f"--ranks={files}/deep.json"),
        "ranks in another code": (cut, there, output, f"--ranks={files}/latin.json"),
        "a folder of ranks": (cut, there, output, f"--ranks={files}"),
        "arguments of a list": (
            cut,
            there,
            output,
            "--select=beam",
            f"--select_args={args}",
        ),
        "a selector of no package": (cut, there, output, "--select=no_such_q7:f"),
    }
    assert len(lines) >= 24
    ended = commands.run(lines)
    assert not {name: end for name, end in ended.items() if not is_refusal(end)}
    assert support.contents(files) == before
    assert list(tmp_path.iterdir()) == [files]


def test_there_are_five_hundred():
    """Each campaign checks that it has tried as many as it says."""
    assert sum(mutations.EXAMPLES.values()) >= 500
