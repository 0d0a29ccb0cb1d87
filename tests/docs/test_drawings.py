"""The drawings of the Concepts page are what their script draws, and can be read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "drawings"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(name="draw")
def draw_fixture(monkeypatch) -> Any:
    """The script, imported from its own folder."""
    monkeypatch.syspath_prepend(FOLDER)
    import draw

    return draw


def test_the_files_are_what_the_script_draws(draw):
    """To the byte, so that a changed script cannot leave an old picture behind."""
    drawn = {f"{name}.svg": make().svg() for name, make in draw.DRAWINGS.items()}
    files = {path.name: path.read_text() for path in FOLDER.glob("*.svg")}
    assert 4 <= len(drawn) <= 6
    assert drawn == files, "run python docs/drawings/draw.py"


def texts(path: Path) -> Iterator[tuple[str, float, float]]:
    """Every text of a picture with its left and right end, in a wide font."""
    for node in ElementTree.parse(path).getroot().iter(f"{SVG}text"):
        # DejaVu Sans, the widest of the usual fonts, has 0.62 em a letter on average
        width = 0.62 * float(node.get("font-size")) * len(node.text)
        left = float(node.get("x")) - width * {"middle": 0.5, "end": 1}.get(
            node.get("text-anchor"), 0
        )
        yield node.text, left, left + width


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda p: p.stem)
def test_a_picture_is_white_behind_and_loses_no_text(path):
    """Dark pages show it, and nothing is written past its edges."""
    root = ElementTree.parse(path).getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    background = root.find(f"{SVG}rect")
    assert (background.get("fill"), background.get("height")) == (
        "#FFFFFF",
        f"{height:g}",
    )
    outside = [text for text, left, right in texts(path) if left < 0 or right > width]
    assert not outside


def test_the_page_shows_every_drawing_with_words_for_it():
    """An alternative text of a sentence, for who does not see it."""
    shown = re.findall(
        r"!\[([^\]]+)\]\(drawings/(\w+)\.svg\)", (DOCS / "concepts.md").read_text()
    )
    assert sorted(name for _, name in shown) == sorted(
        path.stem for path in FOLDER.glob("*.svg")
    )
    assert all(len(words.split()) >= 8 for words, _ in shown), shown


def test_the_curves_are_those_of_the_costs(draw):
    """The break-even rank that the page names, by the library's own count."""
    rows, outs = draw.SHAPE
    even = rows * outs / (rows + outs)
    cost = draw.LayerCost(rows, outs, 1, 1, 1, 1)
    assert cost.form_params(int(even)) <= cost.dense_params
    assert cost.form_params(int(even) + 1) > cost.dense_params
    gauge = draw.GaugeCost(rows, outs, 1, 1, 1, 1, 1)
    assert all(gauge.form_params(rank) < rows * outs for rank in range(min(rows, outs)))
    assert gauge.form_params(min(rows, outs)) == rows * outs
