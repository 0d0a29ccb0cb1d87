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
from typing import Any

from absl import app, flags, logging

from lowrank_jax.errors import UserError, raise_all
from train import allocator, command_line, distributed, early, xla_flags
from train.stopping import Interrupted, Stopped

_DISK_ERRORS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of the quota",
    errno.EROFS: "Name another folder",
    errno.EACCES: "Mend its permissions, or name another folder",
    errno.EPERM: "Mend its permissions, or name another folder",
}
"""What a disk may refuse, and what the user can do about it."""


def run(
    main: Callable[..., None], *, takes: str = "", examples: Sequence[str] = ()
) -> None:
    """Runs a binary, after its flags are parsed.

    Args:
      main: What it does; reads flags by itself.
      examples: Command lines, for --help, after `python -m`.
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

    parse = functools.partial(command_line.parse, main=main, examples=examples)
    app.run(_ending(start), flags_parser=_ending(parse))


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
        return f"error: {command_line.message_of(error)}"
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


def _errno_in(text: str) -> int | None:
    """The error number in a message of the storage driver."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else None


def _path_in(text: str) -> str | None:
    """The file in a message of the storage driver."""
    found = re.search(r'"(/[^"]*)"', text)
    return found and found[1]
