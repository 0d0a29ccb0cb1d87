"""Pairs of sentences, several packed into each row, for translation.

Rows have one shape, so that nothing compiles anew, and few pads. Which pairs share a
row is fixed by the data set alone. Letters: `n` pairs or tokens, `b` rows.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from lowrank_jax import errors
from lowrank_jax.errors import UserError, raise_all
from train.data import text as texts
from train.data import tokenizers
from train.data.own_arrays import Arrays
from train.data.sources import ArraySource, RawDataset
from train.data.token_ids import Ids, digest, id_dtype
from train.data.tokenizers import Tokenizer

SPECIALS = {"pad": 0, "bos": 1, "eos": 2}
"""Ids that stand for no text: padding, the begin and the end of a sentence."""

MOST_SEGMENTS = 255
"""Pairs of a row: their numbers are kept in 8 bits, and 0 is padding."""

_OPEN_ROWS = 1024
"""Rows that a pair is tried in, so that packing takes linear time."""

_SEED = 20_240
"""Of the order in which pairs are packed, whatever a run's seed is."""

Pair = tuple[Ids, Ids]


def sentence_pairs(
    *,
    data_dir: str,
    text: str | Mapping[str, Sequence[str]],
    source: str,
    target: str,
    tokenizer: Mapping[str, Any],
    source_length: int,
    target_length: int,
) -> RawDataset:
    """Reads pairs of sentences, packed into rows.

    Training pairs that are too long for a row, or empty on a side, are dropped and
    counted in the facts; among those to judge by they are a mistake.

    Args:
      data_dir: Where TFDS sets lie, and what relative paths start from.
      text: The name of a TFDS set, or the paths of two files of lines for each of
        "train", "validation" and "test": first the source's, then the target's.
      source: The feature to translate from.
      target: The feature to translate to.
      tokenizer: A name in `train.data.tokenizers.TOKENIZERS` and its arguments; one
        for both sides.
      source_length: Tokens of a row to translate.
      target_length: Tokens of its translation.

    Returns:
      Arrays "source" (source_length,), w1..wn EOS of each sentence; "target" and
      "label" (target_length,), BOS w1..wn and w1..wn EOS; "source_segment" and
      "target_segment", 1, 2, ... for the pairs of the row and 0 for padding. Facts
      "vocab_size", "tokenizer", "specials" and, in "about", "dropped_pairs",
      "pad_share" and "digests" by split.

    Raises:
      MissingFile: A file or set is not there.
      UserError: Text that is not UTF-8, or sides that do not match.
    """
    lengths = (source_length, target_length)
    problems = [
        f"{side}_length: must be at least 2, a token and the end, got {length}."
        " Raise it."
        for side, length in zip(("source", "target"), lengths, strict=True)
        if length < 2
    ]
    raise_all(problems)
    tokenizers.check(tokenizer)
    place = texts.locate(text, [source, target], data_dir)
    return _pack_all(place, json.dumps(tokenizer, sort_keys=True), lengths)


@functools.lru_cache(maxsize=4)
def _pack_all(place: texts.Place, spec: str, lengths: tuple[int, int]) -> RawDataset:
    """The data set; kept, as tokenizing takes most of a short run's time."""
    made, pairs = _tokenize(place, spec)
    splits, shares, dropped = {}, {}, 0
    for split, of_split in pairs.items():
        if split == "train":
            kept = [pair for pair in of_split if not _misfit(pair, lengths)]
            dropped = len(of_split) - len(kept)
            _check_kept(len(kept), len(of_split), lengths)
        else:
            kept = of_split
            _check_fit(split, kept, lengths)
        arrays = pack(kept, lengths, id_dtype(made.size))
        splits[split] = ArraySource(arrays)
        shares[split] = round(pad_share(arrays), 4)
        logging.info(
            "sentence_pairs: %s has %d pairs in %d rows, %.1f %% of them padding",
            *(split, len(kept), len(splits[split]), 100 * shares[split]),
        )
    logging.info("sentence_pairs: %d training pairs dropped", dropped)
    facts = {
        "arrays": {
            name: {"shape": list(array.shape[1:]), "dtype": str(array.dtype)}
            for name, array in splits["train"].arrays.items()
        },
        "vocab_size": made.size,
        "tokenizer": made.to_facts(),
        "specials": dict(SPECIALS),
        "about": {
            "pad_share": shares,
            "dropped_pairs": dropped,
            "digests": {
                split: digest(source.arrays.values())
                for split, source in splits.items()
            },
        },
    }
    return RawDataset("sentence_pairs", facts, **splits)


def _tokenize(place: texts.Place, spec: str) -> tuple[Tokenizer, dict[str, list[Pair]]]:
    """The tokenizer trained on both sides of the training split; pairs by split."""
    by_split = texts.read_lines(place)
    both = [line for column in by_split["train"] for line in column]
    made = tokenizers.build(json.loads(spec), both, reserved=len(SPECIALS))
    pairs = {}
    for split, columns in by_split.items():
        with errors.at(split):
            sides = []
            for side, column in zip(("source", "target"), columns, strict=True):
                with errors.at(side):
                    sides.append(made.encode_batch(column))
        pairs[split] = list(zip(*sides, strict=True))
    return made, pairs


def _misfit(pair: Pair, lengths: Sequence[int]) -> bool:
    """Whether a side has no token, or no room for its end."""
    return any(
        not 0 < len(side) < length for side, length in zip(pair, lengths, strict=True)
    )


def _check_kept(kept: int, given: int, lengths: Sequence[int]) -> None:
    if not kept:
        raise UserError(
            f"train text: must hold a pair of 1 to {lengths[0] - 1} and 1 to"
            f" {lengths[1] - 1} tokens, got none among {given:,}. Raise source_length"
            " and target_length."
        )


def _check_fit(split: str, pairs: Sequence[Pair], lengths: Sequence[int]) -> None:
    wrong = [index for index, pair in enumerate(pairs) if _misfit(pair, lengths)]
    if wrong:
        first = " and ".join(str(len(side)) for side in pairs[wrong[0]])
        raise UserError(
            f"{split} text: pairs must have 1 to {lengths[0] - 1} and 1 to"
            f" {lengths[1] - 1} tokens, got {len(wrong):,} that have not, the first"
            f" number {wrong[0] + 1:,} with {first}. Raise source_length and"
            " target_length, or take them out: none to judge by is dropped."
        )


def pack(pairs: Sequence[Pair], lengths: tuple[int, int], dtype: np.dtype) -> Arrays:
    """Lays pairs side by side in rows.

    Args:
      pairs: Tokens of source and target, without specials; each fits into a row.
      lengths: Tokens of a row, of the source and of the target.
      dtype: Of the tokens.

    Returns:
      The arrays of `sentence_pairs`, by row.
    """
    sizes = np.array([[len(side) + 1 for side in pair] for pair in pairs])
    order = np.random.default_rng(_SEED).permutation(len(pairs))
    row, segment = assign(sizes[order], lengths)
    by_row = np.argsort(row, kind="stable")
    order, row, segment = order[by_row], row[by_row], segment[by_row]
    begin, end = (np.array([SPECIALS[name]], dtype) for name in ("bos", "eos"))
    arrays = {}
    for side, name in enumerate(("source", "target")):
        shape, size = (1 + row[-1], lengths[side]), sizes[order, side]
        at = _positions(row, size)
        words = [pairs[index][side] for index in order]
        ended = [part for sentence in words for part in (sentence, end)]
        contents = {f"{name}_segment": np.repeat(segment, size).astype(np.uint8)}
        if name == "source":
            contents["source"] = np.concatenate(ended)
        else:
            begun = [part for sentence in words for part in (begin, sentence)]
            contents |= {
                "target": np.concatenate(begun),
                "label": np.concatenate(ended),
            }
        for key, values in contents.items():
            arrays[key] = np.full(shape, SPECIALS["pad"], values.dtype)
            arrays[key][at] = values
            arrays[key].setflags(write=False)
    return arrays


def assign(
    sizes: Int[np.ndarray, "n 2"], lengths: tuple[int, int]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Assigns each pair to the first row that has room for both of its sides, of the
    last 1,024 that were begun, else to a new one.

    Args:
      sizes: Tokens of each pair, of source and target, specials included.
      lengths: Tokens of a row.

    Returns:
      The row of each pair and its number there, from 1.
    """
    source_room = np.full(len(sizes), lengths[0])
    target_room = np.full(len(sizes), lengths[1])
    held = np.zeros(len(sizes), np.int64)
    row, segment = np.empty_like(held), np.empty_like(held)
    rows = 0
    for index, (source, target) in enumerate(sizes):
        tried = slice(max(0, rows - _OPEN_ROWS), rows + 1)  # the last is a new one
        fits = (source_room[tried] >= source) & (target_room[tried] >= target)
        chosen = tried.start + int(np.argmax(fits))
        source_room[chosen] -= source
        target_room[chosen] -= target
        held[chosen] += 1
        if held[chosen] == MOST_SEGMENTS:
            source_room[chosen] = 0
        rows = max(rows, chosen + 1)
        row[index], segment[index] = chosen, held[chosen]
    return row, segment


def _positions(
    row: Int[np.ndarray, " n"], size: Int[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every token of pairs that come row by row."""
    start = np.cumsum(size) - size
    row_start = start[np.searchsorted(row, row)]  # where the first of its row begins
    within = np.arange(size.sum()) - np.repeat(row_start, size)
    return np.repeat(row, size), within


def pad_share(arrays: Arrays) -> float:
    """Returns the share of positions, of both sides, that are padding."""
    segments = [arrays["source_segment"], arrays["target_segment"]]
    pads = sum(np.count_nonzero(side == 0) for side in segments)
    return float(pads / sum(side.size for side in segments))
