"""The form that every message to the user has."""

import re


def check_form(message: str) -> None:
    """Each place is named once, and what was given is followed by what to do.

    >>> check_form("config.seed: must be at least 0, got -1. Raise it.")
    """
    before, got, after = message.partition(" got ")
    places = before.split(": ")
    assert got and len(places) == len(set(places)) > 1, message
    assert re.search(r"[.:] \S|\.\n", after), message
