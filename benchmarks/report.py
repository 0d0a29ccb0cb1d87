"""Where benchmarks' tables go: stdout, and a page of docs, each in its own place."""

import datetime
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from lowrank_jax import latency
from train.report import logs


def define_flags() -> None:
    """Defines where tables go beside stdout."""
    flags.DEFINE_string(
        "docs", "", "Markdown page that keeps the tables too; made if missing."
    )


def hardware() -> str:
    """Returns what measures: device, versions, and the day."""
    python = ".".join(map(str, sys.version_info[:2]))
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{latency.device_name()}, Python {python}, {today}"


def show(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], more: str = ""
) -> None:
    """Prints a table, and puts it in its place in the page of `--docs`, if one is
    named.

    Args:
      title: Of the table; the benchmark's name is put before it.
      headers: Of the columns.
      rows: Their cells.
      more: What else should be known, such as the versions of others.
    """
    benchmark = pathlib.Path(sys.argv[0]).stem
    about = f"{hardware()}{more and ', '}{more}"
    print(f"\n{title}, {about}\n")
    print(logs.table(headers, rows))
    if flags.FLAGS.docs:
        path = pathlib.Path(flags.FLAGS.docs)
        old = path.read_text() if path.exists() else ""
        command = " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]])
        text = f"{title}: `{command}`; {about}.\n\n{markdown(headers, rows)}"
        path.write_text(placed(old, f"{benchmark}: {title}", text))


def show_ratios(
    title: str,
    variant: str,
    rows: Mapping[str, Mapping[str, float]],
    more: Mapping[str, str],
) -> None:
    """Shows the rows of `timing.ratios`.

    Args:
      title: The subject.
      variant: The title of the first column.
      rows: By the name of the variant.
      more: Further columns: the key in the rows by the title.
    """
    columns = {"ms": "ms", "ratio": "ratio", "+-": "spread", **more}
    cells = [
        [name, *(row[key] for key in columns.values())] for name, row in rows.items()
    ]
    show(title, [variant, *columns], cells)


def show_figures(title: str, figures: Mapping[str, float]) -> None:
    """Shows figures by their names."""
    show(title, ["figure", "value"], [list(item) for item in figures.items()])


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table of Markdown; numbers with three digits.

    >>> print(markdown(["step", "ms"], [["dense", 1.23456]]))
    | step | ms |
    |---|---|
    | dense | 1.23 |
    """
    lines = [headers, ["---"] * len(headers), *rows]
    text = [" | ".join(map(_cell, line)) for line in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(
        f"|{line}|" if i == 1 else f"| {line} |" for i, line in enumerate(text)
    )


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def placed(page: str, name: str, text: str) -> str:
    """Returns a page with a text in the place of this name, at its end if it has none.

    >>> placed("<!-- a -->\\nold\\n<!-- end -->\\nlast\\n", "a", "new")
    '<!-- a -->\\nnew\\n<!-- end -->\\nlast\\n'
    """
    block = f"<!-- {name} -->\n{text}\n<!-- end -->\n"
    place = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->\n", re.DOTALL)
    if place.search(page):
        return place.sub(lambda _: block, page)
    return f"{page}\n{block}" if page else block
