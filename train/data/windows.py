"""Windows of a stream of tokens, for language models.

The tokens of a split lie in memory once, in 8 or 16 bits each; windows are gathered out
of them batch by batch. An epoch's order has 8 bytes a window: at stride 1 it is what
takes the memory. Letters: `b` batch, `t` tokens, `n` tokens of a split.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt

from lowrank_jax import errors
from lowrank_jax.errors import raise_all
from train.data import text as texts
from train.data import tokenizers
from train.data.own_arrays import Arrays
from train.data.sources import RawDataset
from train.data.token_ids import digest
from train.data.tokenizers import Tokenizer

FEATURE = "text"
"""The feature of a TFDS set that is read."""


@dataclasses.dataclass(frozen=True, eq=False)
class WindowSource:
    """Windows of `context` inputs and as many targets, at every `stride` tokens.

    Args:
      tokens: The stream.
      context: Targets of a window; its tokens are one more.
      stride: From one window to the next.
      partial: Whether a last window may run over the end, padded with zeros.
    """

    tokens: UInt[np.ndarray, " n"] = dataclasses.field(repr=False)
    context: int
    stride: int
    partial: bool
    streams: bool = dataclasses.field(default=False, init=False)

    def __len__(self) -> int:
        past_first = len(self.tokens) - 1 - self.context
        if self.partial:
            past_first += self.stride - 1
        return 1 + past_first // self.stride

    def take(self, indices: np.ndarray) -> Arrays:
        """Returns "tokens" (b, context + 1) and "length" (b,), the targets that
        count."""
        starts = np.asarray(indices) * self.stride
        length = np.minimum(len(self.tokens) - 1 - starts, self.context)
        offsets = np.arange(self.context + 1)
        if (length == self.context).all():
            windows = self.tokens[starts[:, None] + offsets]
        else:
            inside = offsets <= length[:, None]
            windows = self.tokens[np.where(inside, starts[:, None] + offsets, 0)]
            windows[~inside] = 0
        return {"tokens": windows, "length": length.astype(np.int32)}


def text_windows(
    *,
    data_dir: str,
    text: str | Mapping[str, str],
    tokenizer: Mapping[str, Any],
    context: int,
    stride: int = 1,
) -> RawDataset:
    """Reads a text as windows of tokens.

    Training rows are the windows at every `stride` tokens. Those of validation and test
    lie side by side, so that every token but the first of a split is a target exactly
    once; the last one is short.

    Args:
      data_dir: Where TFDS sets lie, and what relative paths start from.
      text: The name of a TFDS set with a feature "text", the paths of the files
        {"train": ..., "validation": ..., "test": ...}, or {"file": path} of one whose
        first 90 % of characters are for training, 5 % for validation, 5 % to test; a
        path that ends in .txt may stand alone.
      tokenizer: A name in `train.data.tokenizers.TOKENIZERS` and its arguments.
      context: Targets of a window.
      stride: Tokens from one training window to the next.

    Returns:
      Arrays "tokens" (context + 1,) in the smallest unsigned type and "length", how
      many targets count: tokens[1 : length + 1]. Facts "vocab_size", "tokenizer" and,
      in "about", "digests", what tells the tokens of each split from others.

    Raises:
      MissingFile: A file or set is not there.
      UserError: Text that is not UTF-8, characters that the tokenizer does not know, or
        a split that is shorter than one window.
    """
    raise_all(
        [
            f"{name}: must be at least 1, got {value}. Raise it."
            for name, value in {"context": context, "stride": stride}.items()
            if value < 1
        ]
    )
    tokenizers.check(tokenizer)
    place = texts.locate(text, [FEATURE], data_dir)
    made, tokens = _tokenize(place, json.dumps(tokenizer, sort_keys=True))
    _check_lengths(tokens, context)
    return RawDataset(
        "text_windows",
        _facts(made, tokens, context),
        train=WindowSource(tokens["train"], context, stride, partial=False),
        validation=WindowSource(tokens["validation"], context, context, partial=True),
        test=WindowSource(tokens["test"], context, context, partial=True),
    )


def _facts(
    made: Tokenizer, tokens: Mapping[str, UInt[np.ndarray, " n"]], context: int
) -> dict[str, Any]:
    arrays = {
        "tokens": {"shape": [context + 1], "dtype": str(tokens["train"].dtype)},
        "length": {"shape": [], "dtype": "int32"},
    }
    return {
        "arrays": arrays,
        "vocab_size": made.size,
        "tokenizer": made.to_facts(),
        "about": {
            "digests": {split: digest([stream]) for split, stream in tokens.items()}
        },
    }


def _check_lengths(tokens: Mapping[str, np.ndarray], context: int) -> None:
    raise_all(
        [
            f"{split} text: must hold at least context + 1 = {context + 1:,} tokens,"
            f" one window, got {len(stream):,}. Lower context or give a longer text."
            for split, stream in tokens.items()
            if len(stream) <= context
        ]
    )


@functools.lru_cache(maxsize=4)
def _tokenize(
    place: texts.Place, spec: str
) -> tuple[Tokenizer, dict[str, UInt[np.ndarray, " n"]]]:
    """The tokenizer trained on a text, and the tokens of each split."""
    by_split = texts.read_texts(place)
    made = tokenizers.build(json.loads(spec), [by_split["train"]])
    tokens = {}
    for split, text in by_split.items():
        with errors.at(split):
            tokens[split] = made.encode(text)
        tokens[split].setflags(write=False)
    counts = {split: f"{len(stream):,}" for split, stream in tokens.items()}
    logging.info("text_windows: tokens by split %s, %s ids", counts, f"{made.size:,}")
    return made, tokens
