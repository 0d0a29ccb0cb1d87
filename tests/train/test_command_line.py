"""The binaries from the command line: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import commands
import pytest
from cutting import FIGURES
from messages import check_form

from lowrank_jax import checkpoint


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The quickstart's config through the binary."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    config = "--config=configs/digits_mlp.py:smoke"
    ended = commands.run({"main": ("train.main", config, f"--workdir={workdir}")})
    return workdir, ended["main"].result


def test_main(smoke_run):
    workdir, result = smoke_run
    assert set(result) == {"workdir", "step", "frontier"}
    assert result["workdir"] == str(workdir)
    assert result["step"] == checkpoint.open_checkpoint(workdir).step == 80
    rows = result["frontier"]
    assert [row["rank_fraction"] for row in rows] == [1.0, 0.25, 0.125, 0.0625]
    assert all(set(row) == FIGURES | {"rank_fraction"} for row in rows)
    assert rows[0]["accuracy"] > 0.8


def test_truncate_and_evaluate(smoke_run, tmp_path):
    """From a run to a cut checkpoint to its figures; the picture is a PNG."""
    workdir, cut, picture = smoke_run[0], tmp_path / "cut", tmp_path / "frontier.png"
    run_flag = f"--checkpoint={workdir}"
    ended = commands.run(
        {
            "cut": (
                "train.truncate",
                run_flag,
                f"--output={cut}",
                "--params_fraction=0.25",
            ),
            "figures": ("train.evaluate", f"--checkpoint={cut}"),
            "sweep": (
                "train.evaluate",
                run_flag,
                "--rank_fractions=1,0.5",
                f"--plot={picture}",
            ),
        }
    )
    result, row, rows = (ended[name].result for name in ("cut", "figures", "sweep"))
    assert set(result) == {"output", "params", "stored", "macs", "ranks"}
    assert result["output"] == str(cut)
    assert set(row) == FIGURES
    assert {k: row[k] for k in ("params", "stored", "macs", "ranks")} == {
        k: result[k] for k in ("params", "stored", "macs", "ranks")
    }
    assert row["accuracy"] > 0.5
    assert [row["rank_fraction"] for row in rows] == [1.0, 0.5]
    assert all(set(row) == FIGURES | {"rank_fraction"} for row in rows)
    assert rows[0]["ranks"] == {"hidden/0": 64, "hidden/1": 256}
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


OWN = "own_package.selector"


@pytest.mark.slow
def test_any_selector_by_name_and_arguments(run, tmp_path):
    """A search over the data, one by several arguments, and one's own by import path,
    whose ranks are checked; the form is a flag beside it."""

    def cut(name: str, select: str, **args: Any) -> tuple[str, ...]:
        flags = [f"--select={select}", f"--select_args={json.dumps(args)}"]
        return ("train.truncate", f"--checkpoint={run}", f"--output={name}", *flags)

    outputs = {
        name: str(tmp_path / name)
        for name in ("beam", "budget", "own", "raised", "gauge", "again", "typo")
    }
    ended = commands.run(
        {
            "beam": cut(
                outputs["beam"],
                "beam",
                measure="params",
                fraction=0.5,
                width=1,
                steps=2,
            ),
            "budget": cut(
                outputs["budget"], "energy_budget", measure="macs", fraction=0.25
            ),
            "own": cut(outputs["own"], f"{OWN}:all_but", path="head"),
            "raised": cut(outputs["raised"], f"{OWN}:raised"),
            "typo": cut(outputs["typo"], f"{OWN}:all_but", pth="head"),
            "gauge": (*cut(outputs["gauge"], "rank", value=8), "--form=gauge"),
            "again": (
                "train.truncate",
                f"--checkpoint={outputs['gauge']}",
                f"--output={outputs['again']}",
                "--rank=4",
            ),
            "sweep": (
                "train.evaluate",
                f"--checkpoint={outputs['gauge']}",
                "--rank_fractions=1,0.5",
            ),
        }
    )
    dense = 80 * 10 + 64 * 80
    for name, share in (("beam", 0.5), ("budget", 0.25)):
        ranks = ended[name].result["ranks"]
        sizes = min(90 * ranks["head"], 80 * 10), min(144 * ranks["hidden/0"], 64 * 80)
        assert sum(sizes) <= share * dense  # of each layer in its cheaper form
        assert min(ranks.values()) >= 1
    assert ended["own"].result["ranks"] == {"head": 10, "hidden/0": 32}
    args = {"path": "head", "fraction": 0.5}  # the default is recorded
    about = checkpoint.open_checkpoint(outputs["own"]).metadata["truncated"]
    assert about["selector"] == {"name": f"{OWN}:all_but", "args": args}
    lines = ended["raised"].lines
    assert ended["raised"].status == 1 and [line.split(". ")[0] for line in lines] == [
        f"error: selector: {OWN}:raised: head: rank must be in [0, 10], got 11",
        "hidden/0: rank must be in [0, 64], got 65",
    ]
    assert ended["typo"].message.startswith(
        "error: selector: args: must be an argument"
    )
    assert ended["gauge"].result["ranks"] == {"head": 8, "hidden/0": 8}
    only = "head: rank must be 8, the only one of its form, got 4"
    for name in ("again", "sweep"):
        assert only in ended[name].message
    for name in ("raised", "again", "typo"):
        assert not Path(outputs[name]).exists()


def test_mistakes_are_one_line(run, tmp_path):
    """Exit status 1, one line of `error:`, nothing on stdout, nothing written. What can
    be known of flags and folders is refused before a checkpoint or data are opened."""
    there, new, missing = (tmp_path / name for name in ("there", "new", "missing"))
    (there / "quickstart").mkdir(parents=True)
    absent, output = f"--checkpoint={missing}", f"--output={new}"
    cut, evaluate = ("train.truncate", absent, output), ("train.evaluate", absent)
    config = "--config=configs/digits_mlp.py"
    no_data = "--config.data.name=no_such_package_h7:data"
    cases = {
        "flags: exactly one of --select, --rank, --rank_fraction, --ranks, --energy,"
        " --energy_fraction, --entropy, --threshold, --stable_rank, --effective_rank,"
        " --params_fraction, --macs_fraction must be given, got"
        " ['--rank', '--energy']": (*cut, "--rank=3", "--energy=0.5"),
        "flags: exactly one of --select, --rank,": cut,
        f"--output: must not exist yet, got {there}": (
            "train.truncate",
            f"--checkpoint={run}",
            f"--output={there}",
            "--rank=3",
        ),
        f"--checkpoint: must be a folder with a checkpoint, got {missing}": evaluate,
        "--recalibration_batches: acts only with --recalibrate, got 3": (
            *cut,
            "--rank=3",
            "--recalibration_batches=3",
        ),
        "--select_args: acts only with --select, got": (
            *cut,
            "--rank=3",
            "--select_args={}",
        ),
        "--select_args: must be JSON, got '{'": (
            *cut,
            "--select=rank",
            "--select_args={",
        ),
        "flags: flag --recalibration_batches=0: 0 is not": (
            *cut,
            "--rank=3",
            "--recalibrate",
            "--recalibration_batches=0",
        ),
        "--form: must be one of its values, got 'gague'. Did you mean 'gauge'?": (
            *cut,
            "--rank=3",
            "--form=gague",
        ),
        "--rnak: must be a flag of this program, got '--rnak'. Did you mean"
        " '--rank'?": (
            *cut,
            "--rnak=3",
        ),
        "--recalibration_batches: acts only with --rank_fractions, got 3": (
            *evaluate,
            "--recalibration_batches=3",
        ),
        "--plot: acts only with --rank_fractions, got": (*evaluate, "--plot=x.png"),
        "--plot: must be a place that can be written, got /proc": (
            *evaluate,
            "--rank_fractions=1",
            "--plot=/proc/x.png",
        ),
        "--output: must be a place that can be written, got /proc/x": (
            "train.truncate",
            absent,
            "--output=/proc/x",
            "--rank=3",
        ),
        "--workdir: must be a place that can be written, got /proc/x": (
            "train.main",
            config,
            no_data,
            "--workdir=/proc/x",
        ),
        f"--workdir: must be new or of an earlier quickstart, got {there}": (
            "train.quickstart",
            config,
            f"--workdir={there}",
        ),
        "--checkpoint: must be given, got none": ("train.truncate",),
        "--output: must be given, or --dry_run, and not both, got None and False": (
            "train.truncate",
            absent,
            "--rank=3",
        ),
        f"--output: must be given, or --dry_run, and not both, got '{new}' and True": (
            *cut,
            "--rank=3",
            "--dry_run",
        ),
        "--macs: acts only with --select, got 0.5": (*cut, "--rank=3", "--macs=0.5"),
        "--measure: acts only with --family or --max_drop, got 'params'": (
            *cut,
            "--select=knapsack",
            "--macs=0.5",
            "--measure=params",
        ),
        "flags: at most one of --params, --macs, --latency, --latency_ms, --family,"
        " --max_drop may be given, got": (
            *cut,
            "--select=knapsack",
            "--macs=0.5",
            "--family=0.5",
        ),
        "--family: must be numbers with commas between, got 'half,0.25'": (
            *cut,
            "--select=knapsack",
            "--family=half,0.25",
        ),
        "--select_args: must leave ['fraction'] to the other flags, got": (
            *cut,
            "--select=knapsack",
            '--select_args={"fraction": 0.5}',
            "--macs=0.5",
        ),
        "--macs: must be in (0, 1], got -1.0": (*cut, "--select=lc", "--macs=-1"),
        "--family: must be in (0, 1], got 2.0": (*cut, "--select=lc", "--family=1,2"),
        "--family: must be numbers with commas between, got ''": (
            *cut,
            "--select=lc",
            "--family=",
        ),
        "--family: must have no size twice, got ['0.333333', '0.333333']": (
            *cut,
            "--select=lc",
            "--family=0.33333331,0.33333332",
        ),
        "--macs: needs a selector with a budget, got rank_fraction, which has one": (
            *cut,
            "--select=rank_fraction",
            "--macs=0.5",
        ),
        "--form: acts only where a model is written, got gauge with --dry_run": (
            *cut[:2],
            "--rank=3",
            "--dry_run",
            "--form=gauge",
        ),
        "--ranks_file: must be a new file in a folder that is there, got": (
            *cut,
            "--rank=3",
            "--ranks_file=/no_such_folder/ranks.json",
        ),
        "--ranks_file: must be of one size, got --family=0.5,0.25": (
            *cut,
            "--select=knapsack",
            "--family=0.5,0.25",
            "--ranks_file=x.json",
        ),
    }
    ended = commands.run(cases)
    for message, command in ended.items():
        assert command.message.startswith(f"error: {message}")
        if not message.startswith("flags: flag "):  # which absl words
            check_form(command.message)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "quickstart"]
