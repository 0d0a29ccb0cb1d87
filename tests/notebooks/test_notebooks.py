"""Notebooks: their cells, their pages, and that every one of them runs."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_jax.errors import UserError
from notebooks import percent, render

ROOT = Path(__file__).parents[2]
FOLDER, PAGES = ROOT / "notebooks", ROOT / "docs/notebooks"
every_notebook = pytest.mark.parametrize("name", render.NAMES)


def cells_of(name: str) -> list[percent.Cell]:
    return percent.read_cells(FOLDER / f"{name}.py")


def code_of(name: str) -> list[str]:
    return [cell.text for cell in cells_of(name) if cell.is_code]


@every_notebook
def test_a_notebook_tells_first_and_checks_at_the_end(name):
    """Text before all code; what it claims is asserted; nothing of Jupyter's own."""
    cells = cells_of(name)
    assert not cells[0].is_code and cells[0].text.startswith("# ")
    for said in ("**Asked.**", "**Done.**", "**Seen.**", f"notebooks/{name}.py"):
        assert said in cells[0].text
    assert sum(not cell.is_code for cell in cells) >= 6
    trees = [ast.parse(code) for code in code_of(name)]
    asserts = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 2


@every_notebook
def test_what_it_imports_is_there(name):
    for code in code_of(name):
        for node in ast.walk(ast.parse(code)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert importlib.util.find_spec(module), module


@every_notebook
def test_a_page_is_of_this_notebook(name):
    """The same code and text; its pictures are there, below 100 kB."""
    page = (PAGES / f"{name}.md").read_text()
    assert render.code_of(page) == code_of(name), "run make notebooks"
    for cell in cells_of(name):
        if not cell.is_code:
            assert render.with_pictures(cell.text, name) in page, "run make notebooks"
    pictures = re.findall(r"\((\w+\.png)\)", page)
    assert pictures
    for picture in pictures:
        assert 10_000 < (PAGES / picture).stat().st_size < render.MOST_BYTES


def test_there_is_no_page_without_a_notebook():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(render.NAMES)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(name, tmp_path):
    """From top to bottom, at its real size, with all that it asserts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, "-m", "notebooks.render", name, f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    page = (tmp_path / f"{name}.md").read_text()
    assert render.code_of(page) == code_of(name)
    assert any(tmp_path.glob("*.png"))


# What reads and runs them.


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.py"
    path.write_text(text)
    return path


def test_cells_are_read_with_their_lines(tmp_path):
    text = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\nprint(x)\n"
    assert percent.read_cells(write(tmp_path, text)) == [
        percent.Cell(False, "# Title\n\ntext", 1),
        percent.Cell(True, "x = 1\n\n\nprint(x)", 6),
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1\n", "a.py:1: must be the head of a cell"),
        ("# %% [raw]\n# x\n", "a.py:1: must be '# %%'"),
        ("# %%\n\n# %%\n1\n", "a.py:1: must be a cell with something in it"),
        ("# %% [markdown]\n# x\ny = 1\n", "a.py:1: must be a cell of comments"),
    ],
)
def test_what_is_no_notebook_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        percent.read_cells(write(tmp_path, text))


def page_of(tmp_path: Path, text: str) -> str:
    cells = percent.read_cells(write(tmp_path, text))
    return render.page_of(cells, render.run_cells(cells, "a"), "a")


def test_a_page_shows_what_a_notebook_does(tmp_path):
    """One namespace; what is printed, and the value of a last expression, if any."""
    page = page_of(
        tmp_path,
        "# %%\nx = 'a' * 3\n# %%\nprint(1)\nx\n# %%\nNone\n"
        "# %% [markdown]\n# ![p](q.png)\n",
    )
    assert "```python\nprint(1)\nx\n```\n\n```text\n1\n'aaa'\n```\n" in page
    assert page.endswith("```python\nNone\n```\n\n![p](a_q.png)\n")
    assert render.code_of(page) == ["x = 'a' * 3", "print(1)\nx", "None"]


def test_the_middle_of_much_is_left_out():
    lines = render.trimmed("\n".join(f"{n}  " for n in range(100))).splitlines()
    assert len(lines) == render.MOST_LINES + 1
    assert (lines[0], lines[30], lines[-1]) == ("0", "... (40 lines left out)", "99")


def test_an_assertion_ends_it_with_the_line_of_the_file(tmp_path):
    with pytest.raises(AssertionError) as error:
        page_of(tmp_path, "# %% [markdown]\n# text\n\n# %%\nx = 1\nassert x == 2\n")
    assert error.traceback[-1].lineno == 5  # counted from 0


DRAW = """from pathlib import Path

import numpy as np
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, ({size}, {size}, 3), np.uint8)
Image.fromarray(noise).save("{file}")
"""


@pytest.mark.parametrize(
    "file, size, said",
    [
        ("p.png", 500, r"got 2\d{5} bytes"),
        ("q.png", 10, "got none"),
        ("p.png", 10, ""),
    ],
)
def test_a_picture_must_be_written_and_small(tmp_path, monkeypatch, file, size, said):
    code = DRAW.format(size=size, file=file)
    text = f"# %%\n{code}# %% [markdown]\n# ![p](p.png)\n"
    monkeypatch.setattr(render, "FOLDER", tmp_path)
    (tmp_path / "own_method.py").write_text(text)
    if said:
        with pytest.raises(UserError, match=said):
            render.render("own_method", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        render.render("own_method", tmp_path / "out")
        assert (tmp_path / "out/own_method_p.png").is_file()


def test_an_unknown_notebook_is_refused(tmp_path):
    with pytest.raises(UserError, match="notebook: must be one of .*'owm_method'"):
        render.render("owm_method", tmp_path)
