"""The programs of this project, and the flags that each takes, asked of themselves.

A binary defines its flags when it is imported or just before it runs, and two may
define the same one: each is started in a process of its own, a fork of one that has
imported JAX, up to the call that would parse its flags and run it.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

BINARIES = {
    "train.quickstart": "trains, cuts at three budgets, evaluates and draws",
    "train.main": "trains a config",
    "train.evaluate": "judges a checkpoint",
    "train.truncate": "cuts a checkpoint",
    "train.generate": "writes text with a checkpoint",
    "train.fetch": "fetches the original files of an image set",
    "train.status": "says what runs and sweeps are doing",
    "launch.local": "runs a program as several processes on this machine",
    "launch.sweep": "trains a config at every point of a grid",
    "launch.job": "runs one job of a sweep",
    "examples.serve_digits": "serves the quickstart's checkpoint over HTTP",
}
"""What each does, in the order of the page of commands."""

COMMON = ("help", "verbosity")
"""Flags of every binary that are worth a word; others come with the libraries."""

_PROGRAM = '''
import ast, gc, importlib.util, json, os, runpy, sys

import train.checkpoints, train.loop, train.report.plots
from absl import app, flags
from train import binary

gc.freeze()  # else each fork spends a second on collecting all of this when it ends
app.define_help_flags()


class Reached(BaseException):
    """The call that would parse the flags and run the program."""


def reach(*args, **kwargs):
    raise Reached


app.run = binary.run = reach


def row(flag):
    return {
        "name": flag.name,
        "type": flag.flag_type(),
        "default": None if flag.default is None else flag.default_as_str.strip("'"),
        "help": " ".join((flag.help or "").split()),
        "values": list(getattr(flag.parser, "enum_values", None) or []),
        "required": any("other than None" in v.message for v in flag.validators),
    }


for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        source = open(importlib.util.find_spec(module).origin).read()
        runs = "binary.run(" in source or "app.run(" in source
        sys.argv = [module]
        try:
            runpy.run_module(module, run_name="__main__" if runs else module)
        except Reached:
            pass
        doc = ast.get_docstring(ast.parse(source)) or ""
        ours = {"train", "launch", "examples", "benchmarks", "tests"}
        by_module = flags.FLAGS.flags_by_module_dict()
        own = {
            flag.name
            for owner, defined in by_module.items()
            if owner.split(".")[0] in ours
            for flag in defined
        }
        rows = [row(flags.FLAGS[name]) for name in flags.FLAGS]
        own = [r for r in rows if r["name"] in own]
        foreign = [r for r in rows if r not in own]
        print(json.dumps([module, doc, own, foreign]), flush=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{module}: cannot be imported")
'''


class Flag(NamedTuple):
    """A flag of a binary.

    Args:
      name: Without the dashes.
      type: As absl names it: "string", "bool", "int", ...
      default: As it would be written, None for no value.
      help: What it does.
      values: All that it may be, where these are few.
      required: Whether the binary does not run without it.
    """

    name: str
    type: str
    default: str | None
    help: str
    values: tuple[str, ...]
    required: bool


class Binary(NamedTuple):
    """What a binary says of itself.

    Args:
      doc: Its module's docstring.
      own: Flags that this project defines, by name.
      foreign: Those that come with libraries, by name.
    """

    doc: str
    own: dict[str, Flag]
    foreign: dict[str, Flag]

    def takes(self, name: str) -> bool:
        """Returns whether it has a flag of this name; a bool one has `no` before it,
        a config has flags for its places.

        Args:
          name: As in a command, without the dashes.
        """
        flags = self.foreign | self.own
        negated = flags.get(name.removeprefix("no"))
        return name in flags or (negated is not None and negated.type == "bool")


@functools.cache
def ask(*modules: str) -> dict[str, Binary]:
    """Returns what binaries say of themselves, by module.

    Args:
      *modules: Such as "train.main".

    Raises:
      RuntimeError: One cannot be imported.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = {}
    for line in done.stdout.splitlines():
        module, doc, own, foreign = json.loads(line)
        found[module] = Binary(doc, _by_name(own), _by_name(foreign))
    return found


def _by_name(rows: list[dict]) -> dict[str, Flag]:
    flags = (Flag(**{**row, "values": tuple(row["values"])}) for row in rows)
    return {flag.name: flag for flag in flags}
