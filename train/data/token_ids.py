"""Ids of tokens: their type, and what they are checked for."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import schema

Ids = UInt[np.ndarray, " t"]
"""The tokens of a text."""

MOST_TOKENS = 2**16
"""Ids are kept in at most 16 bits."""


def id_dtype(size: int) -> np.dtype:
    """Returns the smallest unsigned type that counts `size` ids."""
    return np.min_scalar_type(size - 1)


def digest(arrays: Iterable[UInt[np.ndarray, "..."]]) -> str:
    """Returns what tells arrays of ids from others: 16 hexadecimal digits of their
    SHA-256."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()[:16]


def without_reserved(
    ids: Sequence[int] | Int[np.ndarray, " t"], *, size: int, reserved: int
) -> Int[np.ndarray, " u"]:
    """Returns the ids that stand for text, counted from 0.

    Raises:
      UserError: Ids that are not in [0, size).
    """
    ids = np.asarray(ids, np.int64)
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
        raise UserError(
            f"ids: must be in [0, {size - 1}], the tokens of the tokenizer, got"
            f" {sorted(set(wrong.tolist()))[:5]}. Decode with the tokenizer that made"
            " them."
        )
    return ids[ids >= reserved] - reserved


def check_unicode(text: str) -> None:
    """Raises UserError where a text holds half of a surrogate pair, as a command line
    that is not UTF-8 does."""
    at = next((n for n, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if at is not None:
        raise UserError(
            f"text: must be Unicode, got {text[at]!r} at {at:,}. Convert it to UTF-8."
        )


def check_facts(facts: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    """Raises UserError where a tokenizer's facts lack a key or have another type."""
    errors.raise_all(
        schema.compare(facts, {"name": str, "reserved": int, **keys}, "facts")
    )
    if not 0 <= facts["reserved"] < MOST_TOKENS:
        raise damaged(f"reserved: must be in [0, {MOST_TOKENS - 1}]", facts["reserved"])


def damaged(rule: str, got: Any) -> UserError:
    """Returns the mistake of facts that no tokenizer wrote."""
    return UserError(f"facts: {rule}, got {got}. The file is damaged; take another.")
