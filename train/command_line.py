"""The command line of a binary: its flags, what --help says, and mistakes in it."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from lowrank_jax.errors import UserError, nearest, raise_all, unknown
from train import usage

_CONFIG_FAILED = "Error whilst parsing config file"
"""How ml_collections begins the text it puts around an error of `get_config`."""
_HELP = ("--help", "-help", "--helpshort", "-helpshort", "-h")
_NOT_A_CHOICE = re.compile(r"flag --(\w+)=(.*): value should be one of <(.*)>")


def parse(
    argv: list[str], *, main: Callable[..., None], examples: Sequence[str]
) -> list[str]:
    """Parses flags; a mistake in those of the config is one error, help is none.

    Args:
      argv: The command line.
      main: What the binary does; its module says what it is for.
      examples: Command lines, for --help.
    """
    path = config_path(argv)
    if path is not None:
        _check_file(path)
    if any(word in _HELP for word in argv[1:]):
        about = inspect.getdoc(inspect.getmodule(main)) or ""
        config = _load_config(path) if path is not None else None
        config = config.to_dict() if hasattr(config, "to_dict") else config
        print(usage.text(about, examples, path, config))
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:
        # absl ends with status 1 after it has printed its --helpfull
        sys.exit(0 if end.code == 1 else end.code)
    except (AttributeError, LookupError) as error:
        if getattr(error, "name", None) == "get_config":
            raise UserError(
                "--config: must be a file with a function get_config, got"
                f" {path}, which has none. Write one that returns the config."
            ) from error
        if path is not None:
            raise_all(wrong_keys(_load_config(path), argv))
        raise
    except TypeError as error:  # a key below a value, or a value of another type
        if path is None:
            raise
        raise_all(wrong_keys(_load_config(path), argv))
        raise UserError(
            f"--config: flags must give values of the types that the config has, got"
            f" one that is not ({error}). Write a config file of your own for it."
        ) from error
    except flags.Error as error:
        for link in _chain(error):
            if str(link).startswith(_CONFIG_FAILED) and link.__context__:
                raise link.__context__ from None
        raise


def message_of(error: flags.Error) -> str:
    """Returns what absl says of flags, in one line."""
    missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
    if missing:
        return (
            f"{', '.join(missing)}: must be given, got none. Add a value; see --help."
        )
    if isinstance(error, flags.UnrecognizedFlagError):
        name = f"--{error.flagname}"
        known = [f"--{flag}" for flag in usage.own_flags()]
        return f"{name}: {unknown('a flag of this program', name, known)}"
    text = "; ".join(line for line in str(error).splitlines() if line)
    if found := _NOT_A_CHOICE.fullmatch(text):
        name, value, choices = found.groups()
        return f"--{name}: {unknown('one of its values', value, choices.split('|'))}"
    return f"flags: {text.removesuffix('.')}. See --help."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and what it comes from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_file(path: str) -> None:
    """Refuses a config file that is not there, with the nearest one that is."""
    file = Path(path.partition(":")[0])
    if file.is_file():
        return
    folder = file.parent if file.parent.is_dir() else Path("configs")
    near = nearest(file.name, [there.name for there in folder.glob("*.py")])
    fix = f"Did you mean '{folder / near}'?" if near else "Correct the path."
    raise UserError(
        f"--config: must be a config file, got {path}, which is not there. {fix}"
    )


def config_path(argv: Sequence[str]) -> str | None:
    """Returns what --config is given, with the argument after its colon."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        found = re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL)
        if found:
            return following if found[1] is None else found[1]
    return None


def _load_config(path: str) -> Any:
    """The config of a file as it is, without what flags change of it."""
    try:
        return ConfigFileFlagParser("config").parse(path)
    except (TypeError, ValueError) as error:
        raise (error.__context__ or error) from None


def wrong_keys(config: Any, argv: Sequence[str]) -> list[str]:
    """Says of every flag `--config.KEY` whose key the config lacks what there is.

    >>> print(wrong_keys({"seed": 0}, ["--config.sede=1"])[0])
    --config.sede: must be a key of the config, got 'sede'. Did you mean 'seed'?
    >>> (told,) = wrong_keys({"phases": [{"name": "a"}]}, ["--config.name=b"])
    >>> print(told.partition("got ")[2])
    'name'. Did you mean 'phases[0].name'?
    """
    problems = []
    for argument in argv:
        found = re.match(r"--?(?:no)?(config\.[^=]*)", argument)
        if not found:
            continue
        node = config
        for key in re.findall(r"[^.\[\]]+", found[1])[1:]:
            if isinstance(node, list | tuple):
                known: list[Any] = list(range(len(node)))
                key = int(key) if key.isdigit() else key
            else:
                known = sorted(node) if hasattr(node, "keys") else []
            if key not in known:
                text = unknown("a key of the config", key, known)
                below = [p for p in _places(config) if p.endswith(found[1][6:])]
                if below and nearest(key, known) is None:
                    place = below[0].removeprefix(".")
                    text = f"must be a key of the config, got {key!r}. Did you mean"
                    text = f"{text} {place!r}?"
                problems.append(f"--{found[1]}: {text}")
                break
            node = node[key]
    return problems


def _places(node: Any, at: str = "") -> Iterator[str]:
    """Yields what is below a node of a config, as flags name it."""
    listed = isinstance(node, list | tuple)
    parts = enumerate(node) if listed else getattr(node, "items", tuple)()
    for key, part in parts:
        place = f"{at}[{key}]" if listed else f"{at}.{key}"
        yield place
        yield from _places(part, place)
