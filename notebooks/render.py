"""Runs a notebook from top to bottom, and writes it as a page with what it showed.

`python -m notebooks.render NAME --output=docs/notebooks` runs notebooks/NAME.py, each
cell after the other in one namespace and in a folder of its own, and writes NAME.md,
with the code, what it printed, and the value of a last line that is an expression; and
the pictures that a text cell shows by `![what is seen](FILE.png)`, of the name
NAME_FILE.png. An exception of a cell, an `assert` included, ends it and writes nothing.
"""

import argparse
import ast
import contextlib
import io
import re
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from lowrank_jax.errors import UserError
from notebooks.percent import Cell, read_cells
from train import xla_flags

FOLDER = Path(__file__).resolve().parent
NAMES = ("train_and_cut_vit", "own_method", "language_model")
MOST_LINES = 60
"""Of what a cell prints: the middle of more is left out."""
MOST_BYTES = 100_000
"""Of a picture."""

_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[\w.]+\.png)\)")
_HEADER = "<!-- Written by notebooks/render.py: change notebooks/{name}.py. -->\n\n"
_SKIPPED = "<!-- test: skip, takes minutes; tests/notebooks runs the whole notebook -->"


def render(name: str, output: Path) -> float:
    """Runs a notebook and writes its page and pictures; returns its CPU seconds.

    Raises:
      UserError: There is no such notebook, or a picture is missing or too large.
    """
    if name not in NAMES:
        raise UserError(
            f"notebook: must be one of {', '.join(NAMES)}, got {name!r}. Choose one."
        )
    cells, began = read_cells(FOLDER / f"{name}.py"), time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        page = page_of(cells, run_cells(cells, name), name)
        seconds = time.process_time() - began
        pictures = [Path(m["file"]) for m in _PICTURE.finditer(_text_of(cells))]
        for picture in pictures:
            _shrink(picture, name)
        output.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copyfile(picture, output / f"{name}_{picture}")
        (output / f"{name}.md").write_text(page, encoding="utf-8")
    return seconds


def run_cells(cells: Sequence[Cell], name: str) -> Iterator[str]:
    """Runs the code cells in one namespace; yields what each of them showed.

    On the way stderr tells which cell has run and what it showed.
    """
    module = types.ModuleType(name)
    for cell in cells:
        if cell.is_code:
            began, shown = time.process_time(), io.StringIO()
            with contextlib.redirect_stdout(shown):
                _run(cell, module, f"{name}.py")
            seconds = time.process_time() - began
            print(f"{name}.py:{cell.line}: {seconds:.1f} s of CPU", file=sys.stderr)
            print(shown.getvalue(), file=sys.stderr)
            yield shown.getvalue()


def _run(cell: Cell, module: types.ModuleType, file: str) -> None:
    """Runs a cell; the value of a last expression is printed, as notebooks show it."""
    tree = ast.parse("\n" * cell.line + cell.text, file)  # errors name the file's line
    last = tree.body[-1]
    value = (
        ast.Expression(tree.body.pop().value) if isinstance(last, ast.Expr) else None
    )
    exec(compile(tree, file, "exec"), vars(module))
    if value is not None:
        shown = eval(compile(value, file, "eval"), vars(module))
        if shown is not None:
            print(repr(shown))


def page_of(cells: Sequence[Cell], shown: Iterator[str], name: str) -> str:
    """Returns the page of a notebook and of what its code cells showed, in order."""
    parts = []
    for cell in cells:
        if not cell.is_code:
            parts.append(with_pictures(cell.text, name))
            continue
        parts.append(f"{_SKIPPED}\n```python\n{cell.text}\n```")
        if text := trimmed(next(shown)):
            parts.append(f"```text\n{text}\n```")
    return _HEADER.format(name=name) + "\n\n".join(parts) + "\n"


def with_pictures(text: str, name: str) -> str:
    """Returns a text with the names that its pictures have beside its page."""
    return _PICTURE.sub(rf"![\g<alt>]({name}_\g<file>)", text)


def code_of(page: str) -> list[str]:
    """Returns the code cells of a page."""
    return re.findall(r"^```python\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)


def trimmed(text: str) -> str:
    """Returns what a cell printed, without the middle of more than `MOST_LINES`."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        left_out = f"... ({len(lines) - 2 * half} lines left out)"
        lines = [*lines[:half], left_out, *lines[-half:]]
    return "\n".join(lines)


def _text_of(cells: Sequence[Cell]) -> str:
    return "\n".join(cell.text for cell in cells if not cell.is_code)


def _shrink(picture: Path, name: str) -> None:
    """Gives a picture 256 colours, which lines and letters do not miss."""
    if picture.is_file():
        with Image.open(picture) as image:
            few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(picture, optimize=True)
    size = f"{picture.stat().st_size} bytes" if picture.is_file() else "none"
    if not picture.is_file() or picture.stat().st_size >= MOST_BYTES:
        raise UserError(
            f"{name}: picture {picture} must be written by a cell, below {MOST_BYTES}"
            f" bytes, got {size}. Draw it smaller."
        )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=NAMES)
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "docs/notebooks")
    args = parser.parse_args()
    xla_flags.leave_products_apart()  # as binaries do, before the first array
    for name in args.names:
        seconds = render(name, args.output.resolve())
        print(f"{name}: {seconds:.0f} s of CPU, {args.output / name}.md")


if __name__ == "__main__":
    _main()
