"""Notebooks as Python files in the percent format: cells, each headed by `# %%`.

`# %% [markdown]` heads a cell of text, every line of it a comment. It is the format of
jupytext, `jupytext --to ipynb FILE` makes a notebook of it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from lowrank_jax.errors import UserError

_HEAD = re.compile(r"# %%(?P<markdown> \[markdown\])?")


class Cell(NamedTuple):
    """A cell.

    Args:
      is_code: Whether it is Python, not text in Markdown.
      text: What stands in it, without the head, empty lines around it and, of text, the
        comment signs.
      line: Of the file, on which its head stands.
    """

    is_code: bool
    text: str
    line: int


def read_cells(path: Path) -> list[Cell]:
    """Returns the cells of a file.

    Raises:
      UserError: A head of another kind, something before the first one, an empty cell,
        or a line of a text cell that is no comment.
    """
    cells: list[Cell] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("# %%")]
    if not heads or heads[0] != 0:
        raise UserError(
            f"{path.name}:1: must be the head of a cell, '# %%' or '# %% [markdown]',"
            f" got {lines[:1]}. Begin with one."
        )
    for first, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        head, body = _HEAD.fullmatch(lines[first]), lines[first + 1 : end]
        place = f"{path.name}:{first + 1}"
        if head is None:
            raise UserError(
                f"{place}: must be '# %%' or '# %% [markdown]', got {lines[first]!r}."
                " Leave out what else is there."
            )
        is_code = head["markdown"] is None
        if not is_code:
            body = [_uncommented(line, f"{path.name}:{first + 1}") for line in body]
        text = "\n".join(body).strip("\n")
        if not text:
            raise UserError(f"{place}: must be a cell with something in it, got none.")
        cells.append(Cell(is_code, text, first + 1))
    return cells


def _uncommented(line: str, place: str) -> str:
    """A line of a text cell as Markdown."""
    if line and line != "#" and not line.startswith("# "):
        raise UserError(
            f"{place}: must be a cell of comments, got the line {line!r}. Begin it with"
            " '# ', or the cell with '# %%'."
        )
    return line[2:]
