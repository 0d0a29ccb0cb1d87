"""The pages of CONTRIBUTING.md: their code, put into a copy of the tree, holds the
contract of the part that it adds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 40
PARTS = ("penalty", "sampler", "selector", "layer", "task", "method")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "runs", "site", "*.png", "*.egg-info"
)

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (?P<how>file|at the end of): (?P<path>\S+)\n(?P<text>.*)", re.S)


class Edit(NamedTuple):
    """A change of a file.

    Args:
      path: The file.
      old: What stands there, once; "" for a new file, None for what comes to its end.
      new: What comes in its place.
    """

    path: str
    old: str | None
    new: str


def page_of(part: str) -> str:
    """The text of a section, without the comments that no reader sees."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (found,) = re.findall(rf"^(## Add a {part}\n.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.sub(r"^<!-- .* -->\n", "", found, flags=re.M).strip()


def blocks(part: str, *languages: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(page_of(part)) if name in languages]


def edits(part: str) -> Iterator[Edit]:
    """The changes of a page: whole files, ends of files, and hunks of `diff`."""
    for text in blocks(part, "python"):
        found = _FILE.fullmatch(text)
        assert found, f"a block of Python must say its file:\n{text}"
        is_end = found["how"] == "at the end of"
        before = "\n\n" if is_end else ""
        yield Edit(found["path"], None if is_end else "", before + found["text"])
    for text in blocks(part, "diff"):
        for path, hunks in re.findall(
            r"^--- (\S+)\n(.*?)(?=^--- |\Z)", text, re.M | re.S
        ):
            for hunk in hunks.split("@@\n"):
                lines = hunk.splitlines(keepends=True)
                old = "".join(line[1:] for line in lines if line[0] in " -")
                new = "".join(line[1:] for line in lines if line[0] in " +")
                yield Edit(path, old, new)


def apply(part: str, tree: Path) -> set[str]:
    """Does what a page says; returns the files that it touched."""
    touched = set()
    for path, old, new in edits(part):
        file = tree / path
        if old == "":
            assert not file.exists(), f"{path} is there already"
            file.write_text(new)
        elif old is None:
            file.write_text(file.read_text() + new)
        else:
            text = file.read_text()
            assert text.count(old) == 1, f"{path}: must hold once:\n{old}"
            file.write_text(text.replace(old, new))
        touched.add(path)
    return touched


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, to which the pages are applied one after the other."""
    folder = tmp_path_factory.mktemp("tree") / "lowrank_jax"
    return Path(shutil.copytree(ROOT, folder, ignore=NOT_COPIED))


@pytest.mark.parametrize("part", PARTS)
def test_a_page_is_short(part):
    """Empty lines do not count."""
    lines = [line for line in page_of(part).splitlines() if line]
    assert len(lines) <= MOST_LINES, len(lines)
    assert max(map(len, lines)) <= 92


@pytest.mark.parametrize("part", PARTS)
def test_a_page_fits_the_tree_as_it_is(part, tree):
    """Every place that it names is there; what comes of it is formatted as all is."""
    touched = [path for path in apply(part, tree) if path.endswith(".py")]
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", *sorted(touched)]
        done = subprocess.run(ruff, cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_what_a_page_adds_holds_its_contract(part, tmp_path):
    """By the commands of the page, and by the rules of architecture."""
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=NOT_COPIED))
    apply(part, copy)
    python = f"PYTHONPATH={copy} {sys.executable}"
    (script,) = blocks(part, "bash")
    rules = "python -m pytest tests/test_architecture.py -q -p no:cacheprovider\n"
    script = re.sub(r"^python", python, script + rules, flags=re.M)
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    passed = [int(number) for number in re.findall(r"(\d+) passed", done.stdout)]
    assert len(passed) == 2 and all(number >= 5 for number in passed), passed
