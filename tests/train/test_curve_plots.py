"""The course of a run, from files that its own writers wrote."""

import json
from pathlib import Path

import commands
import pytest
from pictures import assert_all_is_inside

from lowrank_jax.errors import MissingFile, UserError
from train.report import curve_plots, logs
from train.report.status import StatusFile


def write(workdir: Path, *, shrinks: int = 2) -> None:
    """A run of two phases that evaluates two sizes and shrinks in the first."""
    writer = logs.MetricWriter(workdir, start_step=0)
    writer.write(0, {"model": {"phase": 0, "stored": 500}})
    for step in range(10, 101, 10):
        writer.write(step, {"train": {"loss": 1 / step, "accuracy": 0.5}})
    for number in range(shrinks):
        step, stored = 20 + number * (36 // shrinks), 400 - number
        for _ in range(2):  # the second one changes nothing
            writer.write(step, {"model": {"phase": 0, "stored": stored}})
    for step in (40, 80):
        figures = {"0.5": {"f1": 0.1, "params": 9}, "1.0": {"f1": 0.2, "params": 9}}
        writer.write(step, {"validation": figures})
    writer.write(60, {"model": {"phase": 1, "stored": 300}})
    writer.close()
    phases = [{"name": "maestro"}, {"name": "fine-tuning"}]
    (workdir / "config.json").write_text(json.dumps({"phases": phases}))
    with StatusFile(workdir) as file:
        file.write(state="training", headline="f1")


def test_it_shows_loss_headline_and_parameters(tmp_path):
    """Each size a line; each event a line through all panels with its name."""
    write(tmp_path)
    drawing = curve_plots.draw_course(curve_plots.read(tmp_path))
    loss, headline, stored = drawing.axes
    assert list(loss.lines[0].get_xdata()) == list(range(10, 101, 10))
    assert list(loss.lines[0].get_ydata()) == [1 / n for n in range(10, 101, 10)]
    sizes = {
        line.get_label(): list(line.get_ydata())
        for line in headline.lines
        if not line.get_label().startswith("_")
    }
    assert sizes == {"1": [0.2, 0.2], "0.5": [0.1, 0.1]}
    x, y = stored.lines[0].get_data()
    assert dict(zip(x, y, strict=True)) == {0: 500, 20: 400, 38: 399, 60: 300, 100: 300}
    for panel in drawing.axes:
        marks = [line for line in panel.lines if len(set(line.get_xdata())) == 1]
        assert [line.get_xdata()[0] for line in marks] == [20, 38, 60]
        looks = [line.get_linestyle() for line in marks]
        assert looks == [":", ":", "--"]
    names = [words.get_text() for words in loss.texts]
    assert names == ["shrink", "shrink", "end of maestro"]
    assert headline.get_ylabel() == "validation\nf1"
    assert_all_is_inside(drawing)


def test_shrinks_close_to_one_another_have_one_name(tmp_path):
    write(tmp_path, shrinks=9)
    loss = curve_plots.draw_course(curve_plots.read(tmp_path)).axes[0]
    names = [words.get_text() for words in loss.texts]
    assert names == ["9 shrinks", "end of maestro"]


def test_a_run_that_goes_on(tmp_path):
    """The last line may be half written; what is not known yet is left out."""
    write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    first = [x for x in path.read_text().splitlines() if "train/loss" in x]
    path.write_text("\n".join(first) + '\n{"step": 110, "trai')
    drawing = curve_plots.draw_course(curve_plots.read(tmp_path))
    assert len(drawing.axes) == 1
    path.write_text("")
    with pytest.raises(UserError, match="must hold the loss of a step to draw"):
        curve_plots.plot_course(tmp_path, tmp_path / "a.png")


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(MissingFile, match="got one without metrics.jsonl. Name the"):
        curve_plots.read(tmp_path)
    write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("half of a\n")
    with pytest.raises(UserError, match="must hold the metrics and the config of a"):
        curve_plots.read(tmp_path)


def test_the_command_draws_one_run(tmp_path):
    """Several, and a picture of no known format, are refused in a line."""
    write(tmp_path / "a")
    write(tmp_path / "b")
    a, b, picture = tmp_path / "a", tmp_path / "b", tmp_path / "course.svg"
    ended = commands.run(
        {
            "drawn": ("train.status", str(a), f"--plot={picture}"),
            "two": ("train.status", str(a), str(b), f"--plot={picture}"),
            "format": ("train.status", str(a), f"--plot={tmp_path}/course.gif"),
        }
    )
    assert picture.read_bytes().startswith(b"<?xml")
    assert f"picture: {picture}" in ended["drawn"].out
    said = f"error: --plot: must be of one run, got {a}, {b}. Name one workdir."
    assert ended["two"].message == said
    said = f"must end in .png, .svg, .pdf, got '{tmp_path}/course.gif'. Rename it."
    assert ended["format"].message == f"error: --plot: {said}"
