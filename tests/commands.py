"""Runs many commands of one binary or another, side by side with the real thing.

Importing JAX takes seconds: one process does it once, and each command is a fork of it
that runs the binary's module as `python -m` does. What a command leaves is its status,
its stdout and its stderr.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
_PROGRAM = """
import gc, json, os, runpy, sys

import train.checkpoints, train.loop, train.report.plots

gc.freeze()  # else each fork spends a second on collecting all of this when it ends

for number, (module, *arguments) in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        for stream, ending in ((1, "out"), (2, "err")):
            file = f"{sys.argv[1]}/{number}.{ending}"
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


_DOING = re.compile(r".* \.\.\.|.*: done in \d+\.\d s")


class Ended(NamedTuple):
    """What a command left.

    Args:
      status: Its exit status.
      out: What it printed.
      err: What it printed on stderr.
    """

    status: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """Returns what the last line holds, of a command that went well."""
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def lines(self) -> list[str]:
        """Returns the lines on stderr but those that say what is being done."""
        lines = self.err.splitlines()
        return [line for line in lines if not _DOING.fullmatch(line)]

    @property
    def message(self) -> str:
        """Returns the one line on stderr of a command that ended with a mistake."""
        assert (self.status, self.out) == (1, ""), self
        (line,) = self.lines
        return line


def run(commands: Mapping[str, Sequence[Any]]) -> dict[str, Ended]:
    """Runs commands in turn from the project's folder; tests' packages are importable.

    Args:
      commands: Module and arguments, such as ("train.evaluate", "--checkpoint=x"), by a
        name.
    """
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, folder],
            input=json.dumps([list(map(str, words)) for words in commands.values()]),
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return {
            name: Ended(
                int(status),
                *(Path(folder, f"{n}.{end}").read_text() for end in ("out", "err")),
            )
            for n, (name, status) in enumerate(
                zip(commands, done.stdout.splitlines(), strict=True)
            )
        }
