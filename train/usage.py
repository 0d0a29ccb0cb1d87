"""What --help says: what a binary is for, examples, its flags, the keys of a config."""

import contextlib
import importlib
import io
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from train.meanings import MEANINGS, NAMES

_WIDTH, _COLUMN = 88, 28


def text(
    about: str,
    examples: Sequence[str],
    path: str | None,
    config: Mapping[str, Any] | None,
) -> str:
    """Returns the help of a binary.

    Args:
      about: What it is for.
      examples: Command lines after `python -m`.
      path: The config file that is named on the command line, if one is.
      config: What it makes.
    """
    parts = [about]
    if examples:
        lines = [f"  python -m {example}" for example in examples]
        parts.append("\n".join(["Examples:", *lines]))
    own = [_flag(flag) for flag in own_flags().values()]
    parts.append("\n".join(["Flags (--helpfull: those of libraries too):", *own]))
    if "config" in flags.FLAGS:
        if path is not None and (listed := _arguments(path)):
            file = path.partition(":")[0]
            parts.append(f"Arguments, as in --config={file}:smoke\n{listed}")
        parts.append("\n".join(_keys(config)))
    return "\n\n".join(parts)


def own_flags() -> dict[str, flags.Flag]:
    """Returns the flags of the binary that runs, without those of libraries."""
    ours = (sys.argv[0], "train.", "launch.")
    return {
        flag.name: flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(ours)
        for flag in defined
        if not flag.name.startswith("config.")
    }


def _flag(flag: flags.Flag) -> str:
    """A flag with its meaning and default, in a line or more."""
    meaning = (flag.help or "").removesuffix(".")
    if flag.default not in (None, [], False):
        meaning += f"; default {flag.default}"
    return _entry(f"--{flag.name}", f"{meaning}.")


def _entry(name: str, meaning: str) -> str:
    """A name and its meaning in two columns."""
    if not meaning:
        return f"  {name}"
    indent = " " * _COLUMN
    body = textwrap.fill(
        meaning,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if len(name) + 4 > _COLUMN:
        return f"  {name}\n{body}"
    return f"  {name}".ljust(_COLUMN) + body[_COLUMN:]


def _keys(config: Mapping[str, Any] | None) -> list[str]:
    """The keys that a config may have, or those that one has, with their values."""
    if config is None:
        head = (
            "Config keys, in the file and as --config.KEY=VALUE (--config=FILE --help:"
            " values, too):"
        )
        return [head, *(_entry(key, _meaning(key)) for key in MEANINGS)]
    lines = ["Config keys and their values, changed by --config.KEY=VALUE:"]
    for place, value in _leaves(config):
        meaning = MEANINGS.get(re.sub(r"\[\d+\]", "[]", place), "")
        lines.append(_entry(f"{place}={value!r}", meaning.partition(" Default: ")[0]))
    return lines


def _meaning(key: str) -> str:
    """A key's meaning, with the names that it takes."""
    if key not in NAMES:
        return MEANINGS[key]
    module, _, table = NAMES[key].partition(":")
    names = ", ".join(sorted(getattr(importlib.import_module(module), table)))
    return f"{MEANINGS[key]} Names: {names}."


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a config with its place, as a flag names it."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}" if place else key)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{place}[{index}]")
    else:
        yield place, value


def _arguments(path: str) -> str:
    """What stands after a config file's colon, where the file says it."""
    printed = io.StringIO()
    file = path.partition(":")[0]
    with (
        contextlib.redirect_stdout(printed),
        contextlib.suppress(Exception, SystemExit),
    ):
        ConfigFileFlagParser("config").parse(f"{file}:help")
    return printed.getvalue().rstrip()
