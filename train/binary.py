"""What the binaries share: how they start, and how a mistake ends them.

A mistake of the user (in flags, config, files or disks) ends with one message on stderr
and exit status 1, a run that was asked to stop, or lost another of its processes, with
status 75: started again, it goes on. Any other exception is a bug, of ours or
of the user's code, and keeps its traceback. `--verbosity=1` shows it for both.
"""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from lowrank_jax.errors import UserError, raise_all
from train import allocator, distributed, early, xla_flags
from train.report import logs
from train.stopping import Interrupted, Stopped

_DISK_ERRORS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of the quota",
    errno.EROFS: "Name another folder",
    errno.EACCES: "Mend its permissions, or name another folder",
    errno.EPERM: "Mend its permissions, or name another folder",
}
"""What a disk may refuse, and what the user can do about it."""
_CONFIG_FAILED = "Error whilst parsing config file"
"""How ml_collections begins the text it puts around an error of `get_config`."""


def run(main: Callable[..., None], *, takes: str = "") -> None:
    """Runs a binary, after its flags are parsed.

    Args:
      main: What it does; reads flags by itself.
      takes: What its arguments are, where it takes some beside flags, one at least; it
        is called with them.
    """

    def start(argv: list[str]) -> None:
        early.SIGNALS.imported()
        arguments = argv[1:]
        if arguments and not takes:
            raise UserError(f"flags: must begin with --, got {arguments}. Add the --.")
        if takes and not arguments:
            raise UserError(f"{takes}: must be given, got none. Add one or more.")
        if not flags.FLAGS["verbosity"].present:
            # orbax tells every file, and the traceback of each error that it raises
            logging.set_verbosity(logging.FATAL)
        distributed.make_room()
        allocator.keep_freed()
        xla_flags.leave_products_apart()
        main(*arguments)

    app.run(_ending(start), flags_parser=_ending(_parse_flags))


def check_companions(
    flag_values: flags.FlagValues, companions: Mapping[str, Sequence[str]]
) -> None:
    """Refuses flags that would be ignored.

    Args:
      flag_values: The flags as parsed.
      companions: For a flag's name, those of the flags of which it needs one.

    Raises:
      UserError: A flag is given and none of those that it acts with.
    """
    raise_all(
        [
            f"--{name}: acts only with {' or '.join('--' + other for other in others)},"
            f" got {flag_values[name].value!r} alone. Add one, or drop it."
            for name, others in companions.items()
            if flag_values[name].present
            and not any(flag_values[other].value for other in others)
        ]
    )


def _ending(function: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    """Returns the function with its mistakes turned into one message and status 1."""

    @functools.wraps(function)
    def ended(argv: list[str]) -> Any:
        try:
            return function(argv)
        except Exception as error:
            error = distributed.peer_lost(error) or error
            message = _message_of(error)
            if message is None and not distributed.has_peers():
                raise
            if message is None or flags.FLAGS["verbosity"].value >= 1:
                traceback.print_exc()
            status = error.status if isinstance(error, Stopped) else 1
            if distributed.has_peers():  # that would wait for this one to shut down
                distributed.end_process(message or "", status)
            print(message, file=sys.stderr)
            sys.exit(status)

    return ended


def _message_of(error: Exception) -> str | None:
    """The message that ends a binary; None for a bug."""
    if isinstance(error, Interrupted):
        return f"stopped: {error}"
    if isinstance(error, UserError | Stopped):
        return f"error: {error}"
    if isinstance(error, flags.Error):
        return f"error: {_flags_message(error)}"
    # A full disk reaches us through several layers, as a cause or as text alone.
    # What merely came up while another error was handled is a bug of its own.
    for link in _causes(error):
        code = link.errno if isinstance(link, OSError) else _errno_in(str(link))
        if code in _DISK_ERRORS:
            place = getattr(link, "filename", None) or _path_in(str(link)) or "disk"
            return (
                f"error: {place}: must be readable, writable and not full, got"
                f" {os.strerror(code)!r}. {_DISK_ERRORS[code]}."
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and what it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and what it comes from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno_in(text: str) -> int | None:
    """The error number in a message of the storage driver."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else None


def _path_in(text: str) -> str | None:
    """The file in a message of the storage driver."""
    found = re.search(r'"(/[^"]*)"', text)
    return found and found[1]


def _flags_message(error: flags.Error) -> str:
    """What absl says of flags, in one line."""
    missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
    if missing:
        return (
            f"{', '.join(missing)}: must be given, got none. Add a value; see --help."
        )
    text = "; ".join(line for line in str(error).splitlines() if line)
    return f"flags: {text.removesuffix('.')}. See --help."


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a mistake in those of the config is one error, help is none."""
    path = _config_path(argv)
    if path is not None and not Path(path.partition(":")[0]).is_file():
        raise UserError(
            f"--config: must be a config file, got {path}, which is not there. Correct"
            " the path."
        )
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl ends with status 1 after it has printed its help
        _print_config_help(path)
        sys.exit(0)
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


def _config_path(argv: Sequence[str]) -> str | None:
    """What --config is given, with the argument after its colon."""
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
    --config.sede: must be one of ['seed'], got 'sede'. Correct it.
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
                problems.append(
                    f"--{found[1]}: must be one of {known}, got {key!r}. Correct it."
                )
                break
            node = node[key]
    return problems


def _print_config_help(path: str | None) -> None:
    """Says where the keys of a config stand, for binaries that take one."""
    if "config" not in flags.FLAGS:
        return
    print(
        "\nConfig keys stand in the file that --config names, each with its value;"
        "\n--config.KEY=VALUE changes one, such as --config.seed=1 or"
        " --config.phases[0].until.steps=100."
    )
    if path is None:
        print("With --config=FILE before --help, the keys of that file are listed.")
        return
    for key, value in logs.flatten({"config": _load_config(path).to_dict()}):
        print(f"  --{key.replace('/', '.')}={value!r}")
