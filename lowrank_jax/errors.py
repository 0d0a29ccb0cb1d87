"""Mistakes of the user, told apart from bugs.

Every check of this project raises a `UserError` with one message: the place, the rule,
what was given, what to do. Programs show its message alone; any other exception is a
bug, of ours or of the user's code, and keeps its traceback.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any


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


def nearest(name: Any, known: Iterable[Any]) -> Any:
    """Returns the known name that a misspelled one is most like, None if none is.

    >>> nearest("sede", ["data", "seed"])
    'seed'
    """
    by_text = {str(choice): choice for choice in known}
    found = difflib.get_close_matches(str(name), by_text, n=1)
    return by_text[found[0]] if found else None


def unknown(what: str, name: Any, known: Iterable[Any], *, fix: str = "") -> str:
    """Returns what to say, after a place, of a name that is not among the known ones.

    All of them are listed only where none is near.

    Args:
      what: What it must be, as in "a key of the config".
      name: What was given.
      known: What is known.
      fix: What else to do where none is near.

    >>> unknown("a key", "sede", ["data", "seed"])
    "must be a key, got 'sede'. Did you mean 'seed'?"
    >>> unknown("a key", "lr", ["data", "seed"])
    "must be a key, one of 'data', 'seed', got 'lr'. Choose one."
    """
    known = list(known)
    meant = nearest(name, known)
    if meant is not None:
        return f"must be {what}, got {name!r}. Did you mean {meant!r}?"
    listed = ", ".join(map(repr, known)) or "none"
    return f"must be {what}, one of {listed}, got {name!r}. {fix or 'Choose one.'}"


def raise_all(problems: list[str]) -> None:
    """Raises one error for all problems, a line each; nothing where there is none."""
    if problems:
        raise UserError("\n".join(problems))
