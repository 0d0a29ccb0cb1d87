"""The command `lowrank`: `lowrank train --config=FILE --workdir=DIR`, and the others.

A command is a binary of the repository, run in this process as `python -m train.NAME`
runs it, with the same flags. The binaries come with a clone of the repository, not with
the library: the clone is the one that an editable install points to, whatever the
folder that the command is given in. It stands outside the package, since importing
that imports JAX, for seconds: a binary says something before.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": ("train.main", "train a config, or go on with a run"),
    "evaluate": ("train.evaluate", "evaluate a checkpoint, at any ranks"),
    "truncate": ("train.truncate", "cut a checkpoint, by ranks or within a budget"),
    "generate": ("train.generate", "write text with a checkpoint, at any ranks"),
    "status": ("train.status", "say what a run or a sweep is doing"),
    "quickstart": ("train.quickstart", "train, cut, evaluate, compare, draw"),
    "fetch": ("train.fetch", "get the original files of a data set"),
}
"""Module and purpose of each command."""

_CLONE = Path(__file__).resolve().parent
_NEEDED = ("absl", "ml_collections", "sklearn", "matplotlib", "tensorflow_datasets")
"""What the extra `train` brings and every binary imports, sooner or later."""


def usage() -> str:
    """Returns the commands, a line each.

    >>> print(usage().splitlines()[2])
      lowrank train        train a config, or go on with a run
    """
    lines = [f"  lowrank {name:<12} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lowrank COMMAND FLAGS",
            "",
            *lines,
            "",
            "lowrank COMMAND --help lists the flags of one, lowrank --version the"
            " version.",
        ]
    )


def find_module(name: str, clone: Path = _CLONE) -> str:
    """Returns the module of a command.

    Args:
      name: Of the command.
      clone: Where the repository is, if it is there.

    Raises:
      UserError: There is no such command, the binaries are not there, or what they need
        is not installed.
    """
    if name not in COMMANDS:
        from lowrank_jax.errors import UserError, unknown

        fix = "lowrank --help says what each does."
        raise UserError(f"lowrank: {unknown('a command', name, COMMANDS, fix=fix)}")
    module, _ = COMMANDS[name]
    file = clone.joinpath(*module.split(".")).with_suffix(".py")
    if not (file.is_file() and (clone / "pyproject.toml").is_file()):
        from lowrank_jax.errors import MissingFile

        raise MissingFile(
            f"lowrank {name}: must run from a clone of the repository, which has the"
            f" binaries, got the library alone in {clone}. Clone the repository, and"
            " run pip install --editable '.[train]' in it."
        )
    missing = [one for one in _NEEDED if importlib.util.find_spec(one) is None]
    if missing:
        from lowrank_jax.errors import UserError

        raise UserError(
            f"lowrank {name}: must have what the binaries import, got an environment"
            f" without {', '.join(missing)}. Run pip install --editable '.[train]' in"
            f" {clone}."
        )
    return module


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
      argv: Name and flags of the command; those of the process by default.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        from lowrank_jax.version import __version__

        print(f"lowrank_jax {__version__}")
        return
    try:
        module = find_module(name)
    except ValueError as error:  # as every `UserError` is
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.argv = [module, *flags]
    # the clone's packages, and like `python -m` those of the folder that we are in
    sys.path[:0] = [str(_CLONE), os.getcwd()]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
