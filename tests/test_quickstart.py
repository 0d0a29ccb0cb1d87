"""The quickstart, whole: what the README promises of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import text_configs

from lowrank_jax.errors import UserError
from train import quickstart

ROOT = Path(__file__).parents[1]


def wrote(workdir: Path) -> None:
    """What a quickstart leaves, as far as clearing goes."""
    quickstart.clear(workdir)
    for name in ("run", "params_0.5", "params_0.25"):
        (workdir / name).mkdir()
        (workdir / name / "array").write_text("1")
    (workdir / "frontier.png").write_text("picture")


def test_an_earlier_quickstart_goes(tmp_path: Path):
    """But for what someone else put beside it; what a link leads to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("mine")
    workdir = tmp_path / "quickstart"
    wrote(workdir)
    (workdir / "notes").write_text("mine")
    (workdir / "params_0.35").symlink_to(tmp_path / "elsewhere")
    quickstart.clear(workdir)
    assert sorted(p.name for p in workdir.iterdir()) == ["notes", "quickstart.txt"]
    assert (tmp_path / "elsewhere/mine").read_text() == "mine"


@pytest.mark.parametrize("mark", ["a folder", "an empty file", "another text"])
def test_what_no_quickstart_wrote_stays(tmp_path: Path, mark):
    """`--workdir=runs`, where runs/quickstart is a run, deletes nothing."""
    wrote(tmp_path / "quickstart")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").write_text("a week of work")
    if mark != "a folder":
        text = "" if mark == "an empty file" else "quickstart"
        (tmp_path / "quickstart.txt").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="must be new or of an earlier quickstart"):
        quickstart.clear(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_it_takes_a_task_on_text(tmp_path: Path, capsys):
    """Whose layers are too many to tell each one's rank."""
    config = text_configs.make_config(text_configs.write(tmp_path / "a.txt"))
    for phase in config["phases"]:
        phase["until"] = {"steps": 2}
    workdir = tmp_path / "quickstart"
    quickstart.clear(workdir)
    rows = quickstart.quickstart(config, workdir)
    assert [row["size"] for row in rows] == ["full", "0.5", "0.35", "0.25"]
    assert (workdir / "frontier.png").stat().st_size > 10_000
    table = capsys.readouterr().out.split("cut at budgets of parameters:")[1]
    assert "loss" in table
    for row in rows:
        ranks = row["ranks"].values()
        shown = {f"{min(ranks)} to {max(ranks)}", str(max(ranks))}
        assert any(f"  {span}\n" in table for span in shown)


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path: Path):
    """At least 96 % with all ranks, at most 2 points less at a quarter; a picture."""
    workdir = tmp_path / "quickstart"
    command = [sys.executable, "-m", "train.quickstart"]
    command += ["--config=configs/digits_mlp.py", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {
        row["size"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]
    }
    assert rows["full"]["accuracy"] >= 0.96
    assert rows["0.25"]["accuracy"] >= rows["full"]["accuracy"] - 0.02
    assert rows["0.25"]["params"] < rows["0.5"]["params"] < rows["full"]["params"]
    assert (workdir / "frontier.png").stat().st_size > 10_000
