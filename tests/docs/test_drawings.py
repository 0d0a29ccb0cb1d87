"""The drawings of the Concepts page are what their script draws, and can be read."""

import itertools
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox

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


def texts(path: Path) -> dict[str, Bbox]:
    """Where the texts of a picture are, in the widest of the usual fonts."""
    places = {}
    for node in ElementTree.parse(path).getroot().iter(f"{SVG}text"):
        font = FontProperties(
            family="DejaVu Sans", weight=node.get("font-weight", "normal")
        )
        size, anchor = float(node.get("font-size")), node.get("text-anchor")
        x, y = float(node.get("x")), float(node.get("y"))
        box = TextPath((0, 0), node.text, size=size, prop=font).get_extents()
        left = x - box.width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        place = Bbox.from_extents(left, y - box.y1, left + box.width, y - box.y0)
        places[f"{node.text} at {x:g}, {y:g}"] = place
    return places


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda p: p.stem)
def test_a_picture_can_be_read(path):
    """White behind, so that dark pages show it; no text past its edges or on another's
    place."""
    root = ElementTree.parse(path).getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    background = root.find(f"{SVG}rect").attrib
    assert (background["fill"], background["height"]) == ("#FFFFFF", f"{height:g}")
    places = texts(path)
    outside = [
        text
        for text, place in places.items()
        if place.x0 < 0 or place.x1 > width or place.y0 < 0 or place.y1 > height
    ]
    overlaps = [
        pair
        for pair in itertools.combinations(places, 2)
        if places[pair[0]].overlaps(places[pair[1]])
    ]
    assert not outside and not overlaps


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
