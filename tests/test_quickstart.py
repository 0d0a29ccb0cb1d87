"""The quickstart, whole: what the README promises of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import text_configs

from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from train import baselines, quickstart, showing
from train.config import to_json

ROOT = Path(__file__).parents[1]


def wrote(workdir: Path) -> None:
    """What a quickstart leaves, as far as clearing goes."""
    quickstart.clear(workdir)
    for name in ("run", "size_1", "size_0.25", "size_0.0625"):
        (workdir / name).mkdir()
        (workdir / name / "array").write_text("1")
    for name in showing.PICTURES:
        (workdir / name).write_text("picture")


def test_an_earlier_quickstart_goes(tmp_path: Path):
    """But for what someone else put beside it; what a link leads to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("mine")
    workdir = tmp_path / "quickstart"
    wrote(workdir)
    (workdir / "notes").write_text("mine")
    (workdir / "size_0.125").symlink_to(tmp_path / "elsewhere")
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
    """Which has no baselines, and a line that says why."""
    config = text_configs.make_config(text_configs.write(tmp_path / "a.txt"))
    for phase in config["phases"]:
        phase["until"] = {"steps": 2}
    workdir = tmp_path / "quickstart"
    quickstart.clear(workdir)
    result = quickstart.quickstart(config, workdir, seeds=3)
    assert [row["size"] for row in result["rows"]] == list(showing.SIZES)
    assert list(result["compared"]) == [baselines.NESTED]
    sizes = [row["rank_fraction"] for row in result["compared"][baselines.NESTED]]
    assert sizes == list(showing.FRACTIONS)
    for name in showing.PICTURES:
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert f"no baselines: {baselines.misfit(to_json(config))}\n" in err
    assert "loss" in out.split("each size a checkpoint:")[1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """The quickstart's folder, its line of JSON, and what it printed before."""
    workdir = tmp_path_factory.mktemp("digits") / "quickstart"
    command = [sys.executable, "-m", "train.quickstart"]
    command += ["--config=configs/digits_mlp.py", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    return workdir, json.loads(last), "\n".join(lines)


def span(result: dict[str, Any], series: str, size: float) -> tuple[float, float]:
    """The least and the greatest of three seeds."""
    rows = [r for r in result["compared"][series] if r["rank_fraction"] == size]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2]
    figures = [row["accuracy"] for row in rows]
    return min(figures), max(figures)


@pytest.mark.slow
def test_the_picture_shows_what_is_claimed(digits):
    """Flat for nested, falling for dense + SVD, in bands that are apart; nested near
    models of one size. Those trained alone start at a quarter of the ranks."""
    _, result, printed = digits
    smallest = showing.SIZES[-1]
    nested = span(result, baselines.NESTED, smallest)
    dense = span(result, baselines.DENSE, smallest)
    alone = span(result, baselines.ALONE, smallest)
    assert nested[0] > dense[1] + 0.05
    assert nested[0] > 0.88 and abs(sum(nested) - sum(alone)) / 2 < 0.03
    for series in (baselines.NESTED, baselines.DENSE):
        assert span(result, series, 1.0)[0] > 0.96
    (claim,) = [x for x in printed.splitlines() if f"against {baselines.DENSE}" in x]
    better = claim.split("better at ")[1].split(";")[0]
    assert f"{smallest:g} (by 0." in better


@pytest.mark.slow
def test_a_size_is_what_its_checkpoint_holds(digits):
    """The rows, the points of the picture and the files agree."""
    workdir, result, _ = digits
    rows = {row["size"]: row for row in result["rows"]}
    assert list(rows) == list(showing.SIZES)
    for size, row in rows.items():
        arrays = support.stored_arrays(
            checkpoint.open_checkpoint(workdir / showing.folder_of(size))
        )
        held = [x.size for key, x in arrays.items() if key.startswith("params/")]
        (point,) = [
            r
            for r in result["compared"][baselines.NESTED]
            if (r["seed"], r["rank_fraction"]) == (0, size)
        ]
        assert sum(held) == row["stored"] == row["params"] == point["params"]
        assert (row["macs"], row["ranks"]) == (point["macs"], point["ranks"])
        assert row["accuracy"] == pytest.approx(point["accuracy"], abs=1.5 / 360)
    for name in showing.PICTURES:
        picture = (workdir / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
