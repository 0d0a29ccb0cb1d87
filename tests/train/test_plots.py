"""The figure is written, whatever its series, and refuses rows it cannot draw."""

import sys

import pytest
from PIL import Image

from train.report.plots import plot_frontier


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


@pytest.mark.parametrize("count", [1, 2, 9])
def test_writes_a_png(tmp_path, count):
    path = tmp_path / "frontier.png"
    plot_frontier({f"method {i}": rows(0.01 * i) for i in range(count)}, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 500
        assert len(image.convert("RGB").getcolors(2**24)) > 20
    assert "matplotlib.pyplot" not in sys.modules


def test_a_single_point_is_drawn(tmp_path):
    row = {"accuracy": 0.9, "params": 10, "macs": 100}
    plot_frontier({"dense": [row]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


@pytest.mark.parametrize("missing", ["accuracy", "params", "macs"])
def test_rows_without_a_figure_are_named(tmp_path, missing):
    bad = rows()
    del bad[2][missing]
    with pytest.raises(ValueError, match=r"ours\[2\]"):
        plot_frontier({"ours": bad}, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="at least one row"):
        plot_frontier({}, tmp_path / "bad.png")
