"""Mistakes of the user, told apart from bugs.

Every check of this project raises a `UserError` with one message: the place, the rule,
what was given, what to do. Programs show its message alone; any other exception is a
bug, of ours or of the user's code, and keeps its traceback.
"""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something that the user can mend: "where: rule, got ...; fix"."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that must be there and is not."""


class ExistingFile(UserError, FileExistsError):
    """A file or folder that must not be there and is."""


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not as they were written."""


class SmallBudget(UserError):
    """A budget below what the cheapest choice costs."""


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Puts a place in front of the message of a user's mistake.

    A message that begins with the place already is left as it is.

    >>> with at("config.phases[0]"):
    ...     raise UserError("until: must be at least 1, got 0.")
    Traceback (most recent call last):
    ...
    lowrank_jax.errors.UserError: config.phases[0]: until: must be at least 1, got 0.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{place}: "):
            raise
        raise type(error)(f"{place}: {error}") from error


def raise_all(problems: list[str]) -> None:
    """Raises one error for all problems, a line each; nothing where there is none."""
    if problems:
        raise UserError("\n".join(problems))
