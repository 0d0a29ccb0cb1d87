"""Tokenizers: text to whole numbers and back, without loss.

A tokenizer is trained on the training split alone. It stands in the facts of its data
set, hence in every checkpoint, as JSON that says all there is to say.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import registry, schema

Ids = UInt[np.ndarray, " t"]

MOST_TOKENS = 2**16
"""Token ids are kept in at most 16 bits."""


class Tokenizer(Protocol):
    """Numbers for text: ids in [reserved, size), those below it stand for no text."""

    reserved: int

    @property
    def size(self) -> int:
        """Returns how many ids there are."""
        ...

    def encode(self, text: str) -> Ids:
        """Returns the ids of a text, in the smallest unsigned type that holds all.

        Raises:
          UserError: The text holds what has no id.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the ids of each text, as `encode`, faster."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        """Returns the text of ids; reserved ones are left out.

        Raises:
          UserError: Ids that are none.
        """
        ...

    def lengths(self) -> Int[np.ndarray, " size"]:
        """Returns how many characters each token begins: over the tokens of a text
        they add up to its characters."""
        ...

    def to_facts(self) -> dict[str, Any]:
        """Returns JSON that `from_facts` rebuilds it of."""
        ...


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
                f" {np.argmin(known):,}. Leave them out, or train a tokenizer on text"
                " that holds them."
            )
        return (ranks + self.reserved).astype(id_dtype(self.size))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        ends = np.cumsum([len(text) for text in texts])
        return np.split(self.encode("".join(texts)), ends[:-1]) if len(texts) else []

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        ids = _checked_ids(ids, self)
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
        """Rebuilds it; see `from_facts`."""
        _check_keys(facts, {"name": str, "characters": str, "reserved": int})
        text, reserved = facts["characters"], facts["reserved"]
        _check_reserved(reserved)
        unicode = not any("\ud800" <= c <= "\udfff" for c in text)
        rising = list(text) == sorted(set(text))
        if not text or not unicode or not rising or reserved + len(text) > MOST_TOKENS:
            raise UserError(
                f"characters: must be 1 to {MOST_TOKENS - reserved:,} characters of"
                f" Unicode, rising, got {len(text):,} beginning with {text[:20]!r}. The"
                " file is damaged; take another."
            )
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


TOKENIZERS = {"characters": characters}
"""What makes a tokenizer of training texts, by name: `make(texts, *, reserved)` and the
arguments of the config."""

_KINDS = {"characters": Characters}


def check(spec: Any) -> None:
    """Raises UserError where a config's choice of a tokenizer names none."""
    errors.raise_all(schema.compare(spec, schema.NAMED, "tokenizer"))
    if spec["name"] not in TOKENIZERS:
        raise UserError(
            f"tokenizer.name: must be one of {', '.join(sorted(TOKENIZERS))}, got"
            f" {spec['name']!r}. Correct the spelling."
        )


def build(
    spec: Mapping[str, Any], texts: Sequence[str], *, reserved: int = 0
) -> Tokenizer:
    """Trains a tokenizer.

    Args:
      spec: Its name in `TOKENIZERS` and arguments, `{"name": ..., "args": {...}}`.
      texts: What to train it on: the training split, no other.
      reserved: How many ids to keep for what is no text; they come first.

    Raises:
      UserError: No such tokenizer, or arguments that it does not take.
    """
    check(spec)
    with errors.at("tokenizer"):
        if "reserved" in spec["args"]:
            raise UserError(
                "args: must not hold reserved, which the data set says, got"
                f" {spec['args']}. Leave it out."
            )
        return registry.build(spec, TOKENIZERS, texts, reserved=reserved)


def from_facts(facts: Any) -> Tokenizer:
    """Rebuilds a tokenizer from what `to_facts` returned.

    The facts may come from a stranger's file: they are checked, and nothing in them is
    executed.

    Raises:
      UserError: They are of no tokenizer.
    """
    with errors.at("tokenizer"):
        name = facts.get("name") if isinstance(facts, Mapping) else None
        if not isinstance(name, str) or name not in _KINDS:
            raise UserError(
                "facts: must be a mapping with a name of"
                f" {', '.join(sorted(_KINDS))}, got {str(facts)[:80]}. The file is"
                " damaged; take another."
            )
        return _KINDS[name].from_facts(facts)


def id_dtype(size: int) -> np.dtype:
    """Returns the smallest unsigned type that counts `size` ids."""
    return np.min_scalar_type(size - 1)


def _check_keys(facts: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    errors.raise_all(schema.compare(facts, keys, "facts"))


def _check_reserved(reserved: int) -> None:
    if not 0 <= reserved < MOST_TOKENS:
        raise UserError(
            f"reserved: must be in [0, {MOST_TOKENS - 1}], got {reserved}. The file is"
            " damaged; take another."
        )


def _checked_ids(ids: Any, tokenizer: Tokenizer) -> np.ndarray:
    """Ids counted from 0, without the reserved ones."""
    ids = np.asarray(ids, np.int64)
    wrong = ids[(ids < 0) | (ids >= tokenizer.size)]
    if wrong.size:
        raise UserError(
            f"ids: must be in [0, {tokenizer.size - 1}], the tokens of the tokenizer,"
            f" got {sorted(set(wrong.tolist()))[:5]}. Decode with the tokenizer that"
            " made them."
        )
    return ids[ids >= tokenizer.reserved] - tokenizer.reserved


def _code_points(text: str) -> np.ndarray:
    # half of a surrogate pair, as a prompt may hold, is a character nobody knows
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _shown(items: Sequence[str]) -> str:
    """Some of them, and how many are left."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{', '.join(map(repr, items[:5]))}{more}"
