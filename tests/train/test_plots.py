"""The figure is written, whatever its series, and refuses rows it cannot draw."""

import sys

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.errors import UserError
from train.report.plots import plot_frontier
from train.report.rank_plots import plot_cut


def rows(shift: float = 0.0, scale: float = 1.0):
    return [
        {
            "accuracy": 0.98 - shift - 0.1 * (1 - fraction) ** 3,
            "params": scale * 400_000 * fraction,
            "macs": scale * 5e7 * fraction,
            "rank_fraction": fraction,
        }
        for fraction in (0.125, 0.25, 0.5, 1.0)
    ]


def draw(series, path, headline="accuracy", higher_is_better=True):
    """Writes the picture and returns its pixels."""
    plot_frontier(series, path, headline=headline, higher_is_better=higher_is_better)
    return pixels_of(path)


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_writes_a_png(tmp_path, count):
    """Each series adds its colour; nothing is kept in pyplot."""
    names = [f"method {i}" for i in range(count)]
    series = {name: rows(0.01 * i) for i, name in enumerate(names)}
    pixels = draw(series, tmp_path / "frontier.png")
    assert pixels.shape[1] > pixels.shape[0] > 500
    for index, colour in enumerate(((0, 114, 178), (213, 94, 0), (0, 158, 115))):
        found = (pixels == colour).all(axis=-1).sum()
        assert (found > 100) == (index < count)
    assert "matplotlib.pyplot" not in sys.modules


def test_a_single_point_is_drawn(tmp_path):
    row = {"accuracy": 0.9, "params": 10, "macs": 100}
    pixels = draw({"dense": [row]}, tmp_path / "one.png")
    assert (pixels == (0, 114, 178)).all(axis=-1).sum() > 10


def test_another_headline(tmp_path):
    """Any figure of the rows; its name and direction are in the picture."""
    losses = [{**row, "perplexity": 100 * row["accuracy"]} for row in rows()]
    pictures = [
        draw({"ours": losses}, tmp_path / "a.png", name, higher)
        for name, higher in (
            ("accuracy", True),
            ("perplexity", True),
            ("perplexity", False),
        )
    ]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


@pytest.mark.parametrize("missing", ["accuracy", "params", "macs"])
def test_rows_without_a_figure_are_named(tmp_path, missing):
    bad = rows()
    del bad[2][missing]
    with pytest.raises(UserError, match=r"ours\[2\]"):
        draw({"ours": bad}, tmp_path / "bad.png")
    with pytest.raises(UserError, match="at least one row"):
        draw({}, tmp_path / "bad.png")
    assert not list(tmp_path.iterdir())


BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


@pytest.mark.parametrize("scored", [[], [(50.0, 0.2), (100.0, 0.1), (0.0, 0.3)]])
def test_a_cut_has_a_mark_for_each_size(tmp_path, scored):
    """And a panel more where something was scored, with a line for each cost; what a
    logarithmic axis cannot show is left out."""
    before = {"a": 8, "b": [4, 2], "": 3}
    chosen = {"half": {"a": 4, "b": [2, 1], "": 3}, "all": before}
    for number, points in enumerate(([], scored)):
        plot_cut(
            tmp_path / f"{number}.png",
            before,
            chosen,
            scored=points,
            costs={"half": 50.0, "all": 100.0},
        )
    alone, both = (pixels_of(tmp_path / f"{number}.png") for number in (0, 1))
    for colour in (BLUE, ORANGE):
        assert (alone == colour).all(axis=-1).sum() > 100
    assert (both.shape[1] > alone.shape[1]) == bool(scored)


def test_a_cut_of_a_hundred_layers_fits_on_a_page(tmp_path):
    """What was scored alone is drawn too: NaN is nowhere."""
    before = {f"blocks/{number}": 8 for number in range(100)}
    points = [(1.0, float("nan")), (2.0, 1.0)]
    plot_cut(tmp_path / "a.png", before, {"all": before}, scored=points)
    assert pixels_of(tmp_path / "a.png").shape[0] < 2200
