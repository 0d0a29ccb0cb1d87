"""What pictures show, read from their lines, bands, names and texts; not their
pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import text
from pictures import assert_all_is_inside, bands_of

from lowrank_jax.errors import UserError
from train.report import base_plots
from train.report.plots import draw_frontier, plot_frontier
from train.report.rank_plots import draw_cut, plot_cut

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
NAMES = ("one nested model, cut", "dense model, cut by SVD", "trained for one size")


def rows(shift: float = 0.0, scale: float = 1.0, fractions: bool = False):
    return [
        {
            "accuracy": 0.98 - shift - 0.1 * (1 - fraction) ** 3,
            "params": scale * 400_000 * fraction,
            "macs": scale * 5e7 * fraction,
            **({"rank_fraction": fraction} if fractions else {}),
        }
        for fraction in FRACTIONS
    ]


def seeds(shift: float) -> list[dict[str, float]]:
    """Rows of three seeds, the second and third above and below the first."""
    return rows(shift) + rows(shift - 0.004) + rows(shift + 0.01)


def draw(series, headline="accuracy", higher_is_better=True, **options):
    return draw_frontier(
        series, headline=headline, higher_is_better=higher_is_better, **options
    )


class TestFrontier:
    def test_lines_are_the_means_and_bands_the_least_and_greatest(self):
        """Of the seeds at each size, in both panels, each against its own cost."""
        shifts = dict(zip(NAMES, (0.0, 0.05, 0.02), strict=True))
        series = {name: seeds(shift) for name, shift in shifts.items()}
        drawing = draw(series)
        for panel, cost in zip(drawing.axes, ("params", "macs"), strict=True):
            assert [line.get_label() for line in panel.lines] == list(series)
            for line, band, name in zip(
                panel.lines, bands_of(panel), series, strict=True
            ):
                x, y = line.get_data()
                middle = np.array([r["accuracy"] for r in rows(shifts[name])])
                assert list(x) == [row[cost] for row in rows()]
                np.testing.assert_allclose(y, middle - 0.002)
                for at, mean in zip(x, middle, strict=True):
                    edges = band[np.isclose(band[:, 0], at), 1]
                    ends = [edges.min(), edges.max()]
                    np.testing.assert_allclose(ends, [mean - 0.01, mean + 0.004])

    def test_one_run_has_no_band(self):
        drawing = draw({"a": rows(), "b": rows(0.1)})
        assert not any(bands_of(panel) for panel in drawing.axes)

    def test_fractions_group_what_costs_differ_of(self):
        """Seeds whose ranks were chosen cost different numbers at one fraction."""
        drawing = draw({"a": rows(fractions=True) + rows(scale=3, fractions=True)})
        x, _ = drawing.axes[0].lines[0].get_data()
        np.testing.assert_allclose(x, [800_000 * f for f in FRACTIONS])
        written = [words.get_text() for words in drawing.axes[0].texts]
        assert written == ["0.125", "0.25", "0.5", "1"]
        assert_all_is_inside(drawing)
        left = drawing.axes[0].get_window_extent().x0
        assert all(w.get_window_extent().x0 >= left for w in drawing.axes[0].texts)

    def test_axes_say_what_they_count(self):
        """And which way is better; accuracy is one axis for both."""
        left, right = draw({"a": rows()}, unit="example").axes
        assert left.get_xlabel() == "parameters in the cheapest form"
        assert right.get_xlabel() == "MACs per example"
        assert left.get_ylabel() == "accuracy (higher is better)"
        assert left.get_ylim() == right.get_ylim() and not right.get_ylabel()
        assert {left.get_xscale(), right.get_xscale()} == {"log"}
        falling = [{**row, "loss": row["accuracy"]} for row in rows()]
        (panel,) = draw({"a": falling}, "loss", False, costs=("macs",)).axes
        assert panel.get_ylabel() == "loss (lower is better)"
        stored = [{**row, "stored": 2 * row["params"]} for row in rows()]
        (panel,) = draw({"a": stored}, costs=("stored",)).axes
        assert panel.get_xlabel() == "parameters stored"
        assert list(panel.lines[0].get_xdata()) == [r["stored"] for r in stored]

    @pytest.mark.parametrize("count", [1, 3, 11])
    def test_series_differ_in_colour_marker_and_dashes(self, count):
        """So many as have a look of their own; their names lie above the panels, and
        all text inside."""
        series = {f"selector number {n}": seeds(0.01 * n) for n in range(count)}
        drawing = draw(series, note="digits, 360 test examples", unit="example")
        lines = drawing.axes[0].lines
        looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in lines}
        assert len(looks) == count
        assert_all_is_inside(drawing)
        assert bool(drawing.legends) == (count > 1)
        for legend in drawing.legends:
            assert [words.get_text() for words in legend.get_texts()] == list(series)
            top = max(panel.get_window_extent().y1 for panel in drawing.axes)
            assert legend.get_window_extent().y0 >= top
        assert "matplotlib.pyplot" not in sys.modules  # its state would be global

    def test_letters_are_readable_where_the_picture_is_100_mm_wide(self):
        drawing = draw(dict.fromkeys(NAMES, rows()), note="digits", unit="example")
        drawing.canvas.draw()
        shrunk = (100 / 25.4) / drawing.get_figwidth()
        sizes = [x.get_fontsize() for x in drawing.findobj(text.Text) if x.get_text()]
        assert min(sizes) * shrunk > 4.5

    def test_colours_and_markers_given(self):
        marks = {"a": (1, 0), "b": (1, 2)}
        first, second = draw({"a": rows(), "b": rows()}, marks=marks).axes[0].lines
        assert first.get_color() == second.get_color() == base_plots.COLOURS[1]
        assert (first.get_marker(), second.get_marker()) == ("o", "^")

    @pytest.mark.parametrize("missing", ["accuracy", "params", "macs"])
    def test_rows_without_a_figure_are_named(self, tmp_path, missing):
        bad = rows()
        del bad[2][missing]
        given = {"headline": "accuracy", "higher_is_better": True}
        with pytest.raises(UserError, match=r"ours\[2\]"):
            plot_frontier({"ours": bad}, tmp_path / "bad.png", **given)
        with pytest.raises(UserError, match="at least one row"):
            plot_frontier({}, tmp_path / "bad.png", **given)
        assert not list(tmp_path.iterdir())

    def test_formats(self, tmp_path):
        """By the suffix; a name without one is refused in a line."""
        begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
        assert set(begins) == set(base_plots.SUFFIXES)
        given = {"headline": "accuracy", "higher_is_better": True}
        for suffix, begin in begins.items():
            path = tmp_path / f"frontier{suffix}"
            plot_frontier({"a": rows()[:1]}, path, **given)
            assert path.read_bytes().startswith(begin)
        for name in ("frontier", "frontier.jpg"):
            with pytest.raises(UserError, match="must end in .png, .svg, .pdf, got"):
                plot_frontier({"a": rows()}, tmp_path / name, **given)


BEFORE = {"a": 8, "b": [4, 2], "": 3}
CHOSEN = {"half": {"a": 4, "b": [2, 1], "": 3}, "all": BEFORE}


class TestCut:
    @pytest.mark.parametrize("scored", [[], [(50.0, 0.2), (100.0, 0.1), (0.0, 0.3)]])
    def test_a_cut_has_a_mark_for_each_size(self, scored):
        """And a panel more where something was scored, with a line for each cost; what
        a logarithmic axis cannot show is left out."""
        costs = {"half": 50.0, "all": 100.0}
        drawing = draw_cut(BEFORE, CHOSEN, scored=scored, costs=costs, cost_name="MACs")
        panel, *more = drawing.axes
        assert [bar.get_width() for bar in panel.patches] == [8, 3, 3]
        names = [words.get_text() for words in panel.get_yticklabels()]
        assert names == ["a", "b", "the model itself"]
        marks = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
        assert marks == {"half": [4, 1.5, 3], "all": [8, 3, 3]}
        assert len(more) == bool(scored)
        for other in more:
            points, *lines = other.lines
            assert points.get_xydata().tolist() == [[50.0, 0.2], [100.0, 0.1]]
            assert [line.get_xdata()[0] for line in lines] == [50.0, 100.0]
        assert_all_is_inside(drawing)

    def test_a_hundred_layers_fit_on_a_page(self, tmp_path: Path):
        """What was scored alone is drawn too: NaN is nowhere."""
        before = {f"blocks/{number}": 8 for number in range(100)}
        points = [(1.0, float("nan")), (2.0, 1.0)]
        options = {"scored": points, "costs": {}, "cost_name": "MACs"}
        drawing = draw_cut(before, {"all": before}, **options)
        assert drawing.get_figheight() < 10
        assert drawing.axes[1].lines[0].get_xydata().tolist() == [[2.0, 1.0]]
        plot_cut(tmp_path / "a.svg", before, {"all": before}, scored=points)
        assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
