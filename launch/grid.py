"""Grids of overrides, and the jobs that their product is.

A grid is `KEY=VALUE,VALUE,...`. A key that begins with `config.` is a place in the
config, as train.main's flags have it (`config.phases[0].until.epochs=5,10`); any other
is an argument of the config, which stands after the colon (`lasso=1e-3,1e-2` makes
`--config=FILE:lasso=1e-3`). Commas in brackets or quotes belong to the value. A grid of
one value is the same for all jobs and not in their names.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from lowrank_jax.errors import UserError, raise_all
from train import command_line
from train.config import to_json

_IN_CONFIG = "config."
_LONGEST_VALUE = 32  # characters of a value in a job's name


class Grid(NamedTuple):
    """The values of one key.

    Args:
      key: A place in the config or the name of one of its arguments.
      values: Its values as text.
    """

    key: str
    values: tuple[str, ...]


class Job(NamedTuple):
    """A config, changed.

    Args:
      config: Its file, with the argument after the colon.
      overrides: Flags that change it.
      values: What the grids give it, by short key.
    """

    config: str
    overrides: tuple[str, ...]
    values: dict[str, str]


def parse(text: str) -> Grid:
    """Reads a grid.

    Raises:
      UserError: It has another form.

    >>> parse("config.eval_fractions=(1.0,0.5),(1.0,)")
    Grid(key='config.eval_fractions', values=('(1.0,0.5)', '(1.0,)'))
    """
    key, equals, rest = (part.strip() for part in text.partition("="))
    values = _split(rest)
    is_key = re.fullmatch(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*", key)
    is_place = key.startswith(_IN_CONFIG) or re.fullmatch(r"\w+", key)
    if not (equals and is_key and is_place and all(values)):
        raise UserError(
            f"--grid: must be KEY=VALUE,VALUE,..., got {text!r}. Write"
            " config.seed=0,1 for a place in the config, lasso=1e-3,1e-2 for an"
            " argument of it."
        )
    if len(set(values)) < len(values):
        raise UserError(
            f"--grid: {key} must have each value once, got {rest!r}. Drop the repeated."
        )
    return Grid(key, tuple(values))


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def product(config: str, grids: Sequence[Grid]) -> dict[str, Job]:
    """Returns the jobs by name, in the order of the grids, the last one fastest.

    Args:
      config: The file, with or without an argument after a colon.
      grids: What to change in it.

    Raises:
      UserError: A key that two grids have.
    """
    keys = [grid.key for grid in grids]
    raise_all(
        [
            f"--grid: each key must be given once, got {key} {keys.count(key)} times."
            " Put its values into one."
            for key in sorted(set(keys))
            if keys.count(key) > 1
        ]
    )
    short = _short_keys(keys)
    varied = [g.key for g in grids if len(g.values) > 1] or keys
    jobs: dict[str, Job] = {}
    for values in itertools.product(*(grid.values for grid in grids)):
        chosen = dict(zip(keys, values, strict=True))
        name = "_".join(f"{short[key]}={_in_name(chosen[key])}" for key in varied)
        if name in jobs:  # values that differ in what a name cannot hold
            name = f"{name}_{len(jobs)}"
        jobs[name] = Job(
            _with_arguments(config, chosen),
            tuple(f"--{k}={v}" for k, v in chosen.items() if k.startswith(_IN_CONFIG)),
            {short[key]: chosen[key] for key in varied},
        )
    return jobs


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or as many of the last as tell it from the others."""
    parts = {key: re.findall(r"\w+", key) for key in keys}
    short = {}
    for key in keys:
        others = [parts[other] for other in keys if other != key]
        for count in range(1, len(parts[key]) + 1):
            tail = parts[key][-count:]
            if all(other[-count:] != tail for other in others):
                break
        short[key] = "_".join(tail)
    return short


def _in_name(value: str) -> str:
    """A value as a name of a folder can hold it."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")[:_LONGEST_VALUE]


def _with_arguments(config: str, chosen: Mapping[str, str]) -> str:
    """The config with the arguments among the chosen values behind its own."""
    file, _, argument = config.partition(":")
    mine = [f"{k}={v}" for k, v in chosen.items() if not k.startswith(_IN_CONFIG)]
    arguments = ",".join([*filter(None, [argument]), *mine])
    return f"{file}:{arguments}" if arguments else file


def build_configs(jobs: Mapping[str, Job]) -> dict[str, dict[str, Any]]:
    """Builds and checks the config of each job, as train.main does.

    Raises:
      UserError: What is wrong with them, each mistake once, with the jobs that have it.
    """
    configs, mistakes = {}, {}
    for name, job in jobs.items():
        try:
            configs[name] = _build(job)
        except UserError as error:
            for line in str(error).splitlines():
                mistakes.setdefault(line, []).append(name)
    raise_all(
        [
            line if len(names) == len(jobs) else f"job {' and '.join(names)}: {line}"
            for line, names in mistakes.items()
        ]
    )
    return configs


def _build(job: Job) -> dict[str, Any]:
    """The config of a job as plain values."""
    argv = ["", f"--config={job.config}", *job.overrides]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed, sys_argv=argv)
    try:
        parsed(argv)
    except (AttributeError, LookupError):
        config = ConfigFileFlagParser("config").parse(job.config)
        raise_all(command_line.wrong_keys(config, argv))
        raise
    except flags.Error as error:
        own = [link for link in _chain(error) if isinstance(link, UserError)]
        if own:  # the last: ml_collections puts one of its kind around it
            raise own[-1] from None
        text = str(error).splitlines()[0]
        raise UserError(
            f"--grid: must fit the config, got {text!r}. Correct it."
        ) from (error)
    return to_json(parsed["config"].value)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and what it comes from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
