"""The blocks of a Markdown page: found, checked against the real programs, and run.

- ```python blocks run in order in one namespace; one whose first line is
  `# file: NAME.py` is written to the scratch folder instead.
- ```bash blocks run as they stand, in their places between the others.
- `<!-- test: smoke -->` on the line before a bash block runs its configs as `:smoke`,
  `<!-- test: skip, REASON -->` before either leaves it out. The flags of commands are
  checked in both.
- Everything else is not run, and is named as such: ```text, ```json, ...
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from docs.tools.binaries import BINARIES, ask
from docs.tools.root_pages import ROOT
from lowrank_jax.errors import UserError

RUN = ("python", "bash")
SHOWN = ("", "bibtex", "diff", "ini", "json", "markdown", "text", "toml", "yaml")
"""Languages of blocks that are not run; commands and code are not among them."""

LINKED = ("configs", "examples", "launch", "lowrank_jax", "tests", "train")
"""What of the repository a page finds in its scratch folder."""

LONGEST_S = 1800
"""How long a page may take, beside other work; one that hangs is an error."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<language>[^\s`]*)(?P<rest>.*)$"
)
_COMMENT = re.compile(r"^\s*<!--\s*test:\s*(?P<words>.*?)\s*-->\s*$")
_FILE = re.compile(r"# file: (?P<name>\S+)\n")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
      where: The page and the line of the block's first line.
      language: After the fence.
      text: Without the fences and their indentation.
      smoke: Whether its configs run as `:smoke`.
      skipped: Why it is not run; empty where it is.
    """

    where: str
    language: str
    text: str
    smoke: bool = False
    skipped: str = ""

    @property
    def file(self) -> str | None:
        """The name of the file that it is the text of."""
        found = _FILE.match(self.text) if self.language == "python" else None
        return found and found["name"]

    @property
    def script(self) -> str:
        """What runs: the text, with smoke configs where the page asks for them."""
        return _smoked(self.text) if self.smoke else self.text


def pages() -> list[Path]:
    """Lists the pages whose blocks are to run, as they stand in the repository."""
    roots = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    found = [*roots, ROOT / "launch/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.exists()]


def blocks(text: str, name: str) -> list[Block]:
    """Finds the blocks of a page.

    Args:
      text: Of the page.
      name: Of the page, for messages.

    Raises:
      AssertionError: A fence that is not closed, a language that is neither run nor
        shown, a comment that says nothing known, all with the place.
    """
    found: list[Block] = []
    comment, first = "", 0
    inside: re.Match[str] | None = None
    body: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}:{number}"
        if inside is not None:
            if line.strip() == inside["marks"]:
                found.append(_block(f"{name}:{first}", inside, body, comment))
                comment, inside, body = "", None, []
            else:
                body.append(line[len(inside["indent"]) :])
        elif opened := _FENCE.match(line):
            inside, first = opened, number + 1
        elif said := _COMMENT.match(line):
            assert not comment, f"{where}: two test comments for one block"
            comment = said["words"]
        elif line.strip():
            assert not comment, f"{where}: a test comment without a block: {comment}"
    assert inside is None, f"{name}: a fence is not closed"
    assert not comment, f"{name}: a test comment without a block: {comment}"
    return found


def _block(where: str, fence: re.Match[str], body: list[str], comment: str) -> Block:
    language, rest = fence["language"].lower(), fence["rest"].strip()
    assert language in (*RUN, *SHOWN), (
        f"{where}: a block must be one of {RUN}, or one of {SHOWN} where it is not to"
        f" run, got {language!r}"
    )
    assert not rest, f"{where}: nothing follows the language, got {rest!r}"
    word, _, reason = comment.partition(",")
    assert word in ("", "smoke", "skip"), f"{where}: unknown test comment {comment!r}"
    assert not word or language in RUN, f"{where}: it is not run, drop {comment!r}"
    assert (word == "skip") == bool(reason.strip()), (
        f"{where}: a skip needs a reason, and nothing else does: {comment!r}"
    )
    text = "".join(f"{line}\n" for line in body)
    smoke = word == "smoke"
    assert not smoke or text != _smoked(text), f"{where}: no config to smoke in it"
    return Block(where, language, text, smoke, reason.strip())


def _smoked(text: str) -> str:
    """A script with `smoke` among the arguments of every config."""

    def put(found: re.Match[str]) -> str:
        words = [word for word in (found["words"] or "").split(",") if word]
        return found["file"] + ":" + ",".join(dict.fromkeys([*words, "smoke"]))

    return re.sub(r"(?P<file>--config=\S+?\.py)(?::(?P<words>[^\s'\"\\]*))?", put, text)


# Commands: what a script calls, against what there is.


@dataclasses.dataclass(frozen=True)
class Command:
    """A call of one of our programs, or of make.

    Args:
      program: A module, or "make".
      arguments: What follows it.
    """

    program: str
    arguments: tuple[str, ...]


def commands(script: str) -> Iterator[Command]:
    """Yields the calls of our programs, and of make, in a shell script.

    Args:
      script: As a reader would type it.
    """
    pending = ""
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation over several lines
            pending += "\n"
            continue
        yield from _calls(words)
        pending = ""


def _calls(words: Sequence[str]) -> Iterator[Command]:
    """The calls on one line: of launch.local the one that it starts, too."""
    starts = [
        number + 2
        for number, pair in enumerate(itertools.pairwise(words))
        if pair[1] == "-m" and re.search(r"python[\d.]*$", pair[0])
    ]
    ends = [*(start - 2 for start in starts[1:]), len(words)]
    for start, end in zip(starts, ends, strict=False):
        if words[start].split(".")[0] in (*LINKED, "benchmarks"):
            yield Command(words[start], _until_shell(words[start + 1 : end]))
    if words and words[0] == "make":
        yield Command("make", _until_shell(words[1:]))
    if len(words) > 1 and words[0] == "lowrank" and not words[1].startswith("-"):
        module = {"train": "main"}.get(words[1], words[1])
        yield Command(f"train.{module}", _until_shell(words[2:]))


def _until_shell(words: Sequence[str]) -> tuple[str, ...]:
    """The words before the shell's own."""
    ends = [
        n for n, word in enumerate(words) if word in ("&", "&&", "||", "|", ";", ">")
    ]
    return tuple(words[: min(ends, default=len(words))])


def problems(page: str, found: Sequence[Block]) -> list[str]:
    """Lists the calls in a page that the programs would refuse.

    Args:
      page: Its name.
      found: Its blocks.
    """
    written = {block.file for block in found if block.file}
    return [
        f"{block.where}: {problem}"
        for block in found
        if block.language == "bash"
        for command in commands(block.text)
        for problem in command_problems(command, written)
    ]


def command_problems(command: Command, written: Sequence[str] = ()) -> Iterator[str]:
    """Yields what is wrong with a call of ours: targets, modules, flags, configs.

    Args:
      command: The call.
      written: Files that the page itself makes.
    """
    if command.program == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        targets = [w for w in command.arguments if "=" not in w and w[0] != "-"]
        yield from (f"make has no target {t!r}" for t in targets if t not in known)
        return
    if not _has_module(command.program):
        yield f"there is no program {command.program}"
        return
    asked = BINARIES if command.program in BINARIES else (command.program,)
    binary = ask(*asked)[command.program]
    for word in command.arguments:
        if word == "--":  # launch.local: the command after it is a call of its own
            return
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            continue
        if name.startswith("--config.") and "config" in binary.own:
            continue  # against the config itself, below
        if not binary.takes(name.removeprefix("--")):
            yield f"{command.program} has no flag {name}"
    yield from _config_problems(command, written)


@functools.cache
def _has_module(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _config_problems(command: Command, written: Sequence[str]) -> Iterator[str]:
    """Yields what is wrong with the config of a call, and with flags for its places."""
    files = [
        w.partition("=")[2] for w in command.arguments if w.startswith("--config=")
    ]
    for given in files:
        file, _, words = given.partition(":")
        if file in written:
            continue
        if not (ROOT / file).is_file():
            yield f"there is no config {file}"
            continue
        try:
            config = _get_config(file)(words)
        except UserError as error:
            yield f"{given}: {error}"
            continue
        places = [w for w in command.arguments if w.startswith("--config.")]
        yield from (f"{file} has no {w}" for w in places if not _has_place(config, w))


@functools.cache
def _get_config(file: str):
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def _has_place(config, word: str) -> bool:
    place = config
    for part in word.removeprefix("--config.").partition("=")[0].split("."):
        name, *indices = re.findall(r"[^\[\]]+", part)
        if name not in place:
            return False
        place = place[name]
        for index in indices:
            if int(index) >= len(place):
                return False
            place = place[int(index)]
    return True


# Running.

_DRIVER = """
import json, subprocess, sys

steps = json.load(open(sys.argv[1]))
names = {"__name__": "__page__"}
for where, language, text in steps:
    print(f"[{where}]", flush=True)
    if language == "bash":
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text])
        if done.returncode:
            sys.exit(f"{where}: ended with status {done.returncode}")
    else:
        file, _, line = where.rpartition(":")
        exec(compile("\\n" * (int(line) - 1) + text, file, "exec"), names)
"""


def scratch(folder: Path) -> Path:
    """Makes a folder in which pages run: links to the repository, nothing of it.

    Args:
      folder: An empty one.
    """
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def write_files(found: Sequence[Block], folder: Path) -> None:
    """Writes the files that a page shows.

    Args:
      found: The blocks of the page.
      folder: Where it runs.

    Raises:
      AssertionError: One would lie in the repository.
    """
    for block in found:
        if block.file and not block.skipped:
            path = folder / block.file
            inside = path.resolve().is_relative_to(folder.resolve())
            assert inside, f"{block.where}: {block.file} is not in the scratch folder"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def run(found: Sequence[Block], folder: Path) -> None:
    """Runs the blocks of a page in a process of their own.

    Args:
      found: The blocks of the page.
      folder: Of `scratch`.

    Raises:
      AssertionError: One fails, with what the page printed.
    """
    write_files(found, folder)
    steps = [
        (block.where, block.language, block.script)
        for block in found
        if block.language in RUN and not block.skipped and not block.file
    ]
    if not steps:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(steps, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _DRIVER, file.name],
            cwd=folder,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
        )
    assert done.returncode == 0, done.stdout[-6000:]


def _environment(folder: Path) -> dict[str, str]:
    """What pages run in: this Python first, the repository's modules found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PATH": path, "PYTHONPATH": found, "MPLBACKEND": "agg"}
