"""A tokenizer with a token for each character."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train.data.token_ids import (
    MOST_TOKENS,
    Ids,
    check_facts,
    check_unicode,
    damaged,
    id_dtype,
    without_reserved,
)


@dataclasses.dataclass(frozen=True)
class Characters:
    """A token for each character.

    Args:
      characters: Those that have one, rising.
      reserved: The first ids, which stand for no text.
    """

    characters: str
    reserved: int = 0

    @functools.cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.characters)

    @property
    def size(self) -> int:
        return self.reserved + len(self.characters)

    def encode(self, text: str) -> Ids:
        codes = _code_points(text)
        ranks = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ranks, len(self._codes) - 1)] == codes
        if not known.all():
            unknown = sorted({text[index] for index in np.flatnonzero(~known)})
            raise UserError(
                f"text: characters must be of the {len(self.characters)} of the"
                f" tokenizer, {self.characters!r}, got {_shown(unknown)}, first at"
                f" {np.argmin(known):,}. Leave them out, train on text that holds them,"
                " or take the tokenizer byte_pairs, which knows all."
            )
        return (ranks + self.reserved).astype(id_dtype(self.size))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        ends = np.cumsum([len(text) for text in texts])
        try:
            return np.split(self.encode("".join(texts)), ends[:-1])
        except UserError:
            for number, text in enumerate(texts, 1):
                with errors.at(f"sentence {number:,}"):
                    self.encode(text)
            raise

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        ids = without_reserved(ids, size=self.size, reserved=self.reserved)
        return self._codes[ids].astype("<u4").tobytes().decode("utf-32-le")

    def lengths(self) -> Int[np.ndarray, " size"]:
        return (np.arange(self.size) >= self.reserved).astype(np.int32)

    def to_facts(self) -> dict[str, Any]:
        return {
            "name": "characters",
            "characters": self.characters,
            "reserved": self.reserved,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Characters":
        """Rebuilds it; see `train.data.tokenizers.from_facts`."""
        check_facts(facts, {"characters": str})
        text, reserved = facts["characters"], facts["reserved"]
        check_unicode(text)
        if list(text) != sorted(set(text)):
            raise damaged("characters must be rising", f"{text[:20]!r}...")
        if not 1 <= len(text) <= MOST_TOKENS - reserved:
            rule = f"there must be 1 to {MOST_TOKENS - reserved:,} characters"
            raise damaged(rule, f"{len(text):,}")
        return cls(text, reserved)


def characters(texts: Sequence[str], *, reserved: int = 0) -> Characters:
    """Makes a token of each character that the texts hold.

    Raises:
      UserError: More than there are ids.
    """
    held = sorted(set().union(*texts))
    if reserved + len(held) > MOST_TOKENS:
        raise UserError(
            f"tokenizer: a text may hold {MOST_TOKENS - reserved:,} different"
            f" characters, got {len(held):,}. Use byte_pairs."
        )
    return Characters("".join(held), reserved)


def _code_points(text: str) -> np.ndarray:
    # half of a surrogate pair, as a prompt may hold, is a character nobody knows
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _shown(items: Sequence[str]) -> str:
    """Some of them, and how many are left."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{', '.join(map(repr, items[:5]))}{more}"
