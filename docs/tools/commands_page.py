"""The page of commands, made from the flags of the binaries."""

import re
import textwrap
from collections.abc import Iterator

from docs.tools.binaries import BINARIES, COMMON, Binary, Flag, ask

HEAD = """# Commands

Every program is a module: `python -m train.main --flag=value`. Once the project is
installed from a clone, `lowrank train` is the same; `lowrank` alone lists the others.
`--help` prints the flags and the keys of the config. A flag that is yes or no is
`--flag` or `--noflag`. A flag `--config.KEY=VALUE` changes a place in the config
([all keys](config.md)).

A program ends with status 0; with 1 after a mistake, which is one line on stderr; with
**75** where it saved and is to be started again. Its last line on stdout is one line of
JSON.

This page is made from the flags themselves.
"""

EMPTY = "''"


def page() -> str:
    """Returns the page."""
    binaries = ask(*BINARIES)
    parts = [HEAD, *_overview()]
    for module, binary in binaries.items():
        parts += _section(module, binary)
    foreign = next(iter(binaries.values())).foreign
    parts += ["## Flags of all programs\n", *_table([foreign[n] for n in COMMON])]
    return "\n".join(parts) + "\n"


def _overview() -> Iterator[str]:
    yield "| command | what it does |"
    yield "|---|---|"
    for module, text in BINARIES.items():
        anchor = module.replace(".", "")
        yield f"| [`python -m {module}`](#{anchor}) | {text} |"
    yield ""


def _section(module: str, binary: Binary) -> Iterator[str]:
    yield f"## {module}\n"
    yield f"{_markdown(binary.doc)}\n"
    yield from _table(list(binary.own.values()))


def _table(flags: list[Flag]) -> Iterator[str]:
    if not flags:
        return
    yield "| flag | default | what it does |"
    yield "|---|---|---|"
    for flag in flags:
        name = f"--{flag.name}" if flag.type == "bool" else f"--{flag.name}=..."
        default = "" if flag.default in (None, "None") else f"`{flag.default or EMPTY}`"
        default = "required" if flag.required else default
        values = ", ".join(f"`{value}`" for value in flag.values)
        text = f"{flag.help} One of {values}." if values else flag.help
        yield f"| `{name}` | {default} | {_cell(text)} |"
    yield ""


def _cell(text: str) -> str:
    """Text as it stands in a cell: names of flags as code, nothing as a tag."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![`\w])--\w+", r"`\g<0>`", text)


def _markdown(doc: str) -> str:
    """A docstring as Markdown: one paragraph's commands stay on one line."""
    first, _, rest = doc.strip().partition("\n")
    doc = f"{first}\n{textwrap.dedent(rest)}"
    return re.sub(r"`[^`]+`", lambda code: " ".join(code[0].split()), doc)
