"""The documentation builds without a warning and leads nowhere dead."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import page_links
import pages
import pytest
import yaml
from mkdocs.exceptions import PluginError

from docs.tools import (
    api_pages,
    binaries,
    commands_page,
    config_page,
    hooks,
    root_pages,
)
from docs.tools.root_pages import ROOT

READ_IN_PLACE = sorted(path for path in (*ROOT.glob("*.md"), ROOT / "launch/README.md"))
"""Markdown that is read in the repository, where mkdocs checks no links."""


def build(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """`make docs`, of a folder with a mkdocs.yml, into another one."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={output}"],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(ROOT, output)
    assert done.returncode == 0, done.stdout
    return output


def test_it_builds_without_a_warning(site: Path):
    """With every page of the reference, which is made while it builds."""
    made = {"reference/config", "reference/commands", "reference/api/lowrank_jax"}
    assert all((site / f"{page}.html").is_file() for page in made)


def test_every_link_of_the_site_leads_somewhere(site: Path):
    assert len(list(site.rglob("*.html"))) > 20
    assert page_links.dead_in_site(site) == []


def test_the_site_loads_nothing_from_other_hosts(site: Path):
    assert page_links.foreign_assets(site) == []


@pytest.mark.parametrize("name", api_pages.MODULES)
def test_every_public_name_is_on_its_page(site: Path, name):
    """By its anchor, which links can point to; a docstring stands below it."""
    module = importlib.import_module(name)
    file = site / Path(api_pages.path_of(name)).with_suffix(".html")
    names = api_pages.public_names(module)
    places = {api_pages.place_of(module, one) for one in names}
    assert places and places <= page_links.read(file.read_text()).ids


@pytest.mark.parametrize("page", READ_IN_PLACE, ids=lambda path: path.stem)
def test_links_of_the_repository_lead_somewhere(page: Path):
    assert page_links.dead_links(page) == []


# What the checks are for: pages that are wrong.


def small_site(folder: Path, **files: str) -> Path:
    """A site of a few pages under the project's own settings, without its hooks."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    for key in ("hooks", "exclude_docs", "watch"):
        del settings[key]
    settings["nav"] = ["index.md"]
    python = settings["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    tuples = str(ROOT / "docs/tools/reading.py")
    python["options"]["extensions"], python["paths"] = [tuples], [str(folder)]
    (folder / "docs").mkdir()
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    for name, text in files.items():
        place = folder / ("docs/index.md" if name == "index" else f"{name}.py")
        place.write_text(text)
    return folder


MODULE = '''"""A module."""


def double(x: float) -> float:
    """Returns twice a number.

    Args:
      {name}: Any.
    """
    return 2 * x
'''
GOOD = {"index": "# Title\n\n[here](#title)\n\n::: good\n", "good": MODULE}
WRONG = {
    "dead page": ({"index": "# Title\n\n[there](there.md)\n"}, "there.md"),
    "dead anchor": ({"index": "# Title\n\n[there](#there)\n"}, "there"),
    "dead picture": ({"index": "# Title\n\n![there](there.png)\n"}, "there.png"),
    "no such name": ({"index": "# Title\n\n::: nowhere.at_all\n"}, "nowhere"),
    "unknown parameter": (
        {"index": "# Title\n\n::: bad\n", "bad": MODULE.format(name="y")},
        "y",
    ),
    "no annotation": (
        {
            "index": "# Title\n\n::: bare\n",
            "bare": MODULE.format(name="x").replace("x: float", "x"),
        },
        "x",
    ),
}


def test_a_sound_page_builds(tmp_path: Path):
    """The control of those below."""
    files = {**GOOD, "good": MODULE.format(name="x")}
    done = build(small_site(tmp_path, **files), tmp_path / "site")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_page_does_not_build(tmp_path: Path, name):
    """And the reason names what is wrong."""
    files, reason = WRONG[name]
    done = build(small_site(tmp_path, **files), tmp_path / "site")
    assert done.returncode != 0
    assert reason in done.stdout


def test_dead_links_are_seen(tmp_path: Path):
    """Of files, of headings; not those in code, not those to other hosts."""
    (tmp_path / "other.md").write_text("# One\n\n## Two words: `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#two-words-code) [c](#page)"
        " [d](https://a.org/x)\n`[e](nowhere.md)`\n```text\n[f](nowhere.md)\n```\n"
    )
    assert page_links.dead_links(page) == []
    page.write_text("# Page\n[a](nowhere.md) [b](other.md#three) [c](#other)\n")
    assert len(page_links.dead_links(page)) == 3


def test_foreign_assets_are_seen(tmp_path: Path):
    """Scripts, style sheets, pictures and fonts; a link is none."""
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">x</a><link rel="canonical"'
        ' href="https://example.org"><script src="local.js"></script>'
    )
    (tmp_path / "a.css").write_text("p { background: url(local.png) }")
    assert page_links.foreign_assets(tmp_path) == []
    assert page_links.dead_in_site(tmp_path) == ["a.html: local.js"]
    (tmp_path / "b.html").write_text(
        '<script src="https://example.org/x.js"></script><img src="//a.org/x.png">'
        '<link rel="stylesheet" href="https://example.org/x.css">'
    )
    (tmp_path / "b.css").write_text("@import 'https://example.org/y.css';")
    assert len(page_links.foreign_assets(tmp_path)) == 4


def test_pages_of_the_root_keep_their_links():
    """A page stays a link, a file of the repository becomes its path."""
    text = "[log](docs/LOG.md#log) [loop](train/loop.py) [`x`](train/x.py) [h](#here)"
    moved = root_pages.moved(text, "CONTRIBUTING.md", "guides/contributing.md")
    assert moved == "[log](../LOG.md#log) loop (`train/loop.py`) `x` [h](#here)"


def test_every_program_has_a_row_and_its_flags():
    """Those of train/, launch/ and examples/; flags that a program defines just before
    it runs are among them, and which it cannot do without."""
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for tree in ("train", "launch", "examples")
        for path in (ROOT / tree).rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert programs == set(binaries.BINARIES)
    found = binaries.ask(*binaries.BINARIES)
    assert {"sizes", "port"} <= set(found["examples.serve_digits"].own)
    required = [f.name for f in found["train.main"].own.values() if f.required]
    assert required == ["config", "workdir"]
    assert found["train.truncate"].takes("norecalibrate")
    assert not found["train.truncate"].takes("norank")
    page = commands_page.page()
    assert all(f"## {name}\n" in page for name in programs)
    assert "| `--config=...` | required |" in page


def test_a_folder_in_the_navigation_is_its_pages():
    """Its index first, made pages in their order; one without pages is an error."""
    nav = [{"Home": "index.md"}, {"Methods": "methods/"}, {"API": "api/"}]
    made = ["api/z.md", "api/a.md"]
    paths = ["methods/index.md", "methods/bsr.md", *sorted(made), "index.md"]
    assert hooks.expanded(nav, paths, made) == [
        {"Home": "index.md"},
        {"Methods": ["methods/index.md", "methods/bsr.md"]},
        {"API": made},
    ]
    with pytest.raises(PluginError, match="notebooks/ must hold a page"):
        hooks.expanded(["notebooks/"], paths, made)


def test_a_key_without_a_meaning_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """And one that is no key any more; the page of those there are is made."""
    assert "| `data.batch_size` | int, at least 1 |" in config_page.page()
    told = dict(config_page.meanings.MEANINGS)
    del told["seed"]
    monkeypatch.setattr(config_page.meanings, "MEANINGS", told)
    with pytest.raises(ValueError, match=r"got others: \['seed'\]"):
        config_page.page()


def test_pages_are_found():
    """The walk that the tests of blocks go by."""
    names = {path.relative_to(ROOT).as_posix() for path in pages.pages()}
    assert {"README.md", "docs/index.md", "docs/guides/own_model.md"} <= names
