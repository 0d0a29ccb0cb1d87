"""Every method has a page, which says what its config does and what was measured."""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from lowrank_jax.penalties import PENALTIES
from lowrank_jax.projections import PROJECTIONS
from lowrank_jax.samplers import SAMPLERS
from lowrank_jax.selection.selectors import SELECTORS
from train.actions import ACTIONS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHARED = {"common", "sizes", "text"}
DATA_SETS = {"digits_mlp", "digits_vit", "multi30k", "resnet8", "shakespeare"}
"""Configs that show a method on another data set; the others are methods."""
METHODS = sorted(
    {path.stem for path in (ROOT / "configs").glob("*.py")} - SHARED - DATA_SETS
)
HEADINGS = (
    "Formula",
    "What it is made of",
    "The config",
    "Figures",
    "What to watch for",
)
SLOTS: dict[str, set[str]] = {
    "sampler": {*SAMPLERS},
    "penalties": {*PENALTIES},
    "projections": {*PROJECTIONS},
    "on_end": {*ACTIONS, *SELECTORS},
}
"""What the names in a page's table of slots may be."""

Table = tuple[str, tuple[str, ...]]
"""The header of a table, and its rows."""


def page(name: str) -> str:
    return (DOCS / "methods" / f"{name}.md").read_text()


def sections(text: str, level: str = "##") -> dict[str, str]:
    """What stands under each heading, by heading."""
    parts = re.split(rf"^{level} (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[Table]:
    found = re.findall(r"((?:^\|.*\|\n)+)", text + "\n", re.M)
    rows = [[" ".join(line.split()) for line in table.splitlines()] for table in found]
    return [(header, tuple(rest)) for header, _, *rest in rows]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def anchor(heading: str) -> str:
    """How the site names a heading, as GitHub does."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def results() -> dict[str, list[Table]]:
    """The tables of docs/results.md, by the anchor of their section."""
    found = sections((DOCS / "results.md").read_text())
    return {anchor(heading): tables(text) for heading, text in found.items()}


def unfounded(text: str) -> list[str]:
    """The rows that are not in the section of the results that is linked before."""
    wrong, linked = [], None
    for part in re.split(r"(\(\.\./results\.md#[\w-]+\))", text):
        if part.startswith("(../results.md#"):
            linked = part[len("(../results.md#") : -1]
            continue
        for header, rows in tables(part):
            known = {
                row
                for other, measured_rows in results().get(linked, [])
                if other == header
                for row in measured_rows
            }
            wrong += [row for row in rows if row not in known]
    return wrong


def decimals(text: str) -> set[str]:
    return set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text))


@functools.cache
def measured() -> set[str]:
    texts = ((DOCS / name).read_text() for name in ("results.md", "LOG.md"))
    return set().union(*map(decimals, texts))


@pytest.mark.parametrize("name", ["concepts.md", "methods/index.md"])
def test_numbers_in_the_text_were_measured(name):
    """Those with a point, outside of code."""
    text = re.sub(r"^```.*?^```", "", (DOCS / name).read_text(), flags=re.M | re.S)
    told = decimals(text)
    assert told and not told - measured()


def test_every_method_has_a_page_in_the_index():
    """And no page is of a method that is not there."""
    names = {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"}
    assert len(METHODS) >= 11 and names == set(METHODS)
    linked = set(re.findall(r"\((\w+)\.md\)", page("index")))
    assert linked == names


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_all_parts(name):
    """Its config and a command that trains it; the paper, with its year."""
    found = sections(page(name))
    assert [*found][: len(HEADINGS)] == [*HEADINGS]
    assert re.fullmatch("The papers?", [*found][-1])
    assert re.search(r"\b(19|20)\d\d\b", [*found.values()][-1])
    assert f"`configs/{name}.py`" in found["The config"]
    assert f"from configs import {name}" in found["The config"]
    trains = rf"train\.main --config=configs/{name}\.py"
    assert re.search(trains, found["The config"])


def used_by(name: str) -> dict[str, set[str]]:
    """The names in each slot of a method's config, whatever the phase."""
    config = importlib.import_module(f"configs.{name}").get_config()
    phases = [dict(phase) for phase in config.phases]

    def names(specs: Any) -> set[str]:
        return {spec["name"] for spec in specs}

    return {
        "sampler": names(phase["sampler"] for phase in phases),
        "phases": names(phases),
        **{
            slot: names(spec for phase in phases for spec in phase[slot])
            for slot in ("penalties", "projections", "on_end")
        },
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_slots_is_what_the_config_has(name):
    """All that is named exists, and all that the config uses is named."""
    ((_, rows),) = tables(sections(page(name))["What it is made of"])
    slots = {
        slot: choice for names, choice in map(cells, rows) for slot in names.split(", ")
    }
    used = used_by(name)
    for slot, known in SLOTS.items():
        choice = slots.get(slot, "none")
        named = set(re.findall(r"`(\w+)`", choice))
        assert named <= known, f"{slot}: {sorted(named - known)} are not in its table"
        assert used[slot] <= named, f"{slot}: {sorted(used[slot] - named)} not named"
        assert named or re.match("none|nothing", choice), f"{slot}: {choice}"
    if len(used["phases"]) > 1:
        assert used["phases"] == set(re.findall(r"`(\w+)`", slots["phases"]))


@pytest.mark.parametrize("name", METHODS)
def test_the_figures_stand_in_the_results(name):
    """Each table is part of one in the section that the page links to; each number with
    a point in the text stands in the results or in the log."""
    found = sections(page(name))
    assert tables(found["Figures"])
    assert not unfounded(found["Figures"])
    told = decimals(found["Figures"]) | decimals(found["What to watch for"])
    assert not told - measured()


def test_the_index_has_the_figures_of_the_results():
    """Means and step times, method by method; the table is whole."""
    (header, rows), *_ = tables(page("index"))
    ((columns, known),) = results()["lenet-on-mnist-all-methods"]
    wanted = [name for name in cells(header) if name in cells(columns)]
    assert wanted == ["method", "step time", "whole", "1/2", "1/4", "1/8"]

    def figures(header: str, row: str) -> tuple[str, ...]:
        of = dict(zip(cells(header), cells(row), strict=True))
        of["method"] = re.sub(r"\[(.*)\]\(.*\)", r"\1", of["method"])
        return tuple(of[name] for name in wanted)

    def means(row: str) -> str:
        return re.sub(r" \(\d+\.\d-\d+\.\d\)", "", row)

    told = [figures(header, row) for row in rows]
    assert told == [figures(columns, means(row)) for row in known]


def test_a_figure_that_was_not_measured_is_seen():
    """By its row, its section or its number."""
    header = (
        "| rank fraction | parameters | MACs | held out | mean | test | mean |\n"
        "|---|---|---|\n"
    )
    row = (
        "| 1 | 44,426 | 281,640 | 99.18 / 99.22 / 99.26 | 99.22 |"
        " 99.22 / 99.22 / 99.35 | 99.26 |\n"
    )
    link = "(../results.md#nested-training-near-the-price-of-one-step)\n\n"
    assert unfounded(link + header + row) == []
    assert unfounded(link + header + row.replace("99.35", "99.36"))
    assert unfounded(header + row)
    assert unfounded(link.replace("nested", "nest") + header + row)
    assert decimals("98.4 with 32 % (dense: 98.9), 1.2.3, 14,130") == {"98.4", "98.9"}
