"""A tokenizer of byte pairs: bytes, and pairs of tokens that often stand together.

Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) by the `tokenizers`
package: every text has tokens, and they decode to the same text. Ids: the reserved
ones, the 256 bytes by value, then what each merge adds, in the order of the merges.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

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

BYTES = 256

LONGEST = 64
"""Bytes of a token; a stranger's merges could double it each time."""

_PIECE = 2**16
"""Characters that are tokenized at once: the package keeps some 100 bytes for each."""

# Where words are told apart whatever stands around, so that a text may be cut there.
_CUT = re.compile(r"(?<=\w) (?=\w)")

Merges = tuple[tuple[int, int], ...]
"""Pairs of tokens, counted without the reserved ones, in the order of merging."""


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """Tokens of bytes that were merged in pairs.

    Args:
      merges: What was merged with what.
      reserved: The first ids, which stand for no text.
    """

    merges: Merges = dataclasses.field(repr=False)
    reserved: int = 0

    @functools.cached_property
    def _tokens(self) -> list[bytes]:
        return _expand(self.merges)

    @functools.cached_property
    def _model(self) -> Any:
        from tokenizers import models

        names = [_name(token) for token in self._tokens]
        vocabulary = {name: index for index, name in enumerate(names)}
        merges = [(names[left], names[right]) for left, right in self.merges]
        return _tokenizer(models.BPE(vocabulary, merges))

    @property
    def size(self) -> int:
        return self.reserved + len(self._tokens)

    def encode(self, text: str) -> Ids:
        return np.concatenate(self.encode_batch(list(_pieces(text))))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        for text in texts:
            check_unicode(text)
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        dtype = id_dtype(self.size)
        return [
            (np.array(encoding.ids, np.int32) + self.reserved).astype(dtype)
            for encoding in encodings
        ]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        ids = without_reserved(ids, size=self.size, reserved=self.reserved)
        # a model may write bytes that are no UTF-8
        return b"".join(self._tokens[i] for i in ids).decode("utf-8", "replace")

    def lengths(self) -> Int[np.ndarray, " size"]:
        leads = [
            sum(byte & 0xC0 != 0x80 for byte in token)  # 10xxxxxx goes on
            for token in self._tokens
        ]
        return np.array([0] * self.reserved + leads, np.int32)

    def to_facts(self) -> dict[str, Any]:
        merges = [list(pair) for pair in self.merges]
        return {"name": "byte_pairs", "merges": merges, "reserved": self.reserved}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "BytePairs":
        """Rebuilds it; see `train.data.tokenizers.from_facts`."""
        check_facts(facts, {"merges": list})
        return cls(_checked(facts["merges"], facts["reserved"]), facts["reserved"])


def byte_pairs(
    texts: Sequence[str], *, vocab_size: int, reserved: int = 0
) -> BytePairs:
    """Merges the pairs of tokens that stand together most often, over and over.

    Args:
      texts: What to count them in.
      vocab_size: Tokens in all. There are fewer where no pair is left that stands
        together twice.
      reserved: How many ids to keep for what is no text; they come first.

    Raises:
      UserError: Fewer tokens than bytes, or more than ids.
    """
    if not BYTES + reserved <= vocab_size <= MOST_TOKENS:
        raise UserError(
            f"vocab_size: must be in [{BYTES + reserved}, {MOST_TOKENS:,}], that is"
            f" {BYTES} bytes, {reserved} special tokens and any merges, in 16 bits, got"
            f" {vocab_size:,}. Change it."
        )
    from tokenizers import models, pre_tokenizers, trainers

    model = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - reserved,
        min_frequency=2,
        max_token_length=LONGEST,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        (piece for text in texts for piece in _pieces(text)), trainer
    )
    learned = json.loads(model.to_str())["model"]["merges"]
    tokens = BytePairs(_numbered(learned), reserved)
    logging.info("byte_pairs: %d tokens of the %d asked for", tokens.size, vocab_size)
    return tokens


def _tokenizer(model: Any) -> Any:
    """A pipeline of the package that loses nothing: a text's bytes, in words."""
    import tokenizers
    from tokenizers import pre_tokenizers

    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pipeline


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces whose tokens, one after the other, are the tokens of it all."""
    start = 0
    while cut := _CUT.search(text, start + _PIECE):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _expand(merges: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes of each token. A merge adds none where another made the same bytes."""
    ids = {bytes([byte]): byte for byte in range(BYTES)}
    tokens = list(ids)
    for left, right in merges:
        _add(tokens[left] + tokens[right], ids, tokens)
    return tokens


def _add(token: bytes, ids: dict[bytes, int], tokens: list[bytes]) -> None:
    """Gives a token the next id, unless it has one."""
    if token not in ids:
        ids[token] = len(tokens)
        tokens.append(token)


def _numbered(merges: Iterable[tuple[str, str]]) -> Merges:
    """Merges of the package's names for tokens, as merges of ids."""
    ids = {_name(bytes([byte])): byte for byte in range(BYTES)}
    pairs = []
    for left, right in merges:
        pairs.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return tuple(pairs)


def _checked(merges: Sequence[Any], reserved: int) -> Merges:
    """A stranger's merges, each of two tokens that are there before it."""
    tokens, seen = _expand([]), set()
    ids = {token: index for index, token in enumerate(tokens)}
    for index, merge in enumerate(merges):
        whole = isinstance(merge, list | tuple) and [type(part) for part in merge]
        if whole != [int, int]:
            raise damaged(f"merges[{index}] must be two ids", f"{merge!r:.40}")
        left, right = pair = tuple(merge)
        if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
            rule = f"merges[{index}] must be of ids in [0, {len(tokens) - 1}]"
            raise damaged(rule, f"{merge!r:.40}")
        if pair in seen:
            raise damaged(f"merges[{index}] must be another than before", merge)
        seen.add(pair)
        token = tokens[left] + tokens[right]
        if len(token) > LONGEST:
            rule = f"merges[{index}] must make a token of at most {LONGEST} bytes"
            raise damaged(rule, len(token))
        _add(token, ids, tokens)
    if reserved + len(tokens) > MOST_TOKENS:
        rule = f"there must be at most {MOST_TOKENS:,} tokens"
        raise damaged(rule, f"{reserved + len(tokens):,}")
    return tuple(map(tuple, merges))


def _name(token: bytes) -> str:
    """A token as the package writes it: bytes that do not print stand as letters."""
    return "".join(map(_letters().__getitem__, token))


@functools.cache
def _letters() -> list[str]:
    """The letter of each byte in GPT-2's alphabet, which the package uses."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(BYTES) if byte not in prints)
    letters = {byte: chr(byte) for byte in prints}
    letters |= {byte: chr(BYTES + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(BYTES)]
