"""Translation: the tokens of a target sentence from a source sentence and those before.

Sentences are packed, several pairs to a row; segments say which tokens belong together
(0 is padding). Letters: `b` batch, `s` source tokens, `t` target tokens, `o`
vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lowrank_jax.errors import UserError, raise_all
from train.data import tokenizers
from train.tasks import tokens
from train.tasks.base import Batch, Generation, Task

SOURCE, TARGET = ("source", "source_segment"), ("target", "label", "target_segment")
"""The arrays of a row, of equal length each."""

SPECIALS = ("pad", "bos", "eos")
"""Tokens that are no text: padding, the begin and the end of a sentence."""


def translation(facts: Mapping[str, Any], *, label_smoothing: float = 0.0) -> Task:
    """Makes the task of a data set of packed pairs of sentences.

    It has "source" (s,), sentences that each end with EOS, "target" (t,), sentences
    that each begin with BOS, "label" (t,), what comes after each target token, and
    "source_segment" and "target_segment", which number the pairs of a row from 1.
    Models map source, target and their segments to logits (b, t, o). A pupil learns the
    cross-entropy with its teacher's softmax, token by token.

    Args:
      facts: The data set's facts: "vocab_size", and, if text is to be written and BLEU
        counted, "tokenizer" and "specials", the ids of "pad", "bos" and "eos".
      label_smoothing: As in `tokens.judging`.

    Raises:
      UserError: Arrays that are none of a translation's; all that is missing at once.
    """
    _check(facts, label_smoothing)
    about = facts.get("tokenizer")
    tokenizer = None if about is None else tokenizers.from_facts(about)
    tokens.check_size(facts, tokenizer)
    lengths = {
        f"{name}_length": facts["arrays"][name]["shape"][0]
        for name in ("source", "target")
    }

    def inputs(
        batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[
        Int[Array, "b s"], Int[Array, "b t"], Int[Array, "b s"], Int[Array, "b t"]
    ]:
        del key  # nothing is augmented
        names = ("source", "target", "source_segment", "target_segment")
        source, target, *segments = (batch[name].astype(jnp.int32) for name in names)
        return source, target, *segments

    def labels(batch: Batch) -> tokens.Labels:
        return batch["label"].astype(jnp.int32), batch["target_segment"] > 0

    return Task(
        model_args={"vocab_size": facts["vocab_size"], **lengths},
        example=(jax.ShapeDtypeStruct((1, 1), jnp.int32),) * 4,
        inputs=inputs,
        **tokens.judging(
            labels,
            facts["vocab_size"],
            characters=None if tokenizer is None else tokenizer.lengths(),
            label_smoothing=label_smoothing,
        ),
        headline="perplexity",
        higher_is_better=False,
        unit="token",
        generation=None
        if tokenizer is None
        else _generation(tokenizer, facts["specials"], **lengths),
    )


def _generation(
    tokenizer: tokenizers.Tokenizer,
    specials: Mapping[str, int],
    *,
    source_length: int,
    target_length: int,
) -> Generation:
    """Translates one sentence a row, until its end or until the row is full."""
    pad, bos, eos = (specials[name] for name in SPECIALS)

    def encode(text: str) -> dict[str, np.ndarray]:
        ids = [*tokenizer.encode(text), eos]
        if not 1 < len(ids) <= source_length:
            raise UserError(
                f"must have 1 to {source_length - 1} tokens, which is the"
                f" longest sentence of the model, got {len(ids) - 1}. Give another."
            )
        source = np.full(source_length, pad, np.int32)
        source[: len(ids)] = ids
        places = np.arange(source_length)
        return {
            "source": source,
            "source_segment": (places < len(ids)).astype(np.int32),
        }

    def begin(
        model: nnx.Module, arrays: Mapping[str, Array]
    ) -> tuple[Float[Array, "b o"], Any]:
        cache = model.start(arrays["source"], arrays["source_segment"])
        first = jnp.full((len(arrays["source"]), 1), bos, jnp.int32)
        logits, cache = model.decode(first, cache)
        return logits[:, -1], cache

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([n for n in ids if n not in (pad, bos, eos)])

    return Generation(
        encode=encode,
        begin=begin,
        decode=decode,
        stop=eos,
        limit=target_length,
        needs=("start", "decode"),
        pairs=lambda batch: _unpack(batch, decode),
        score=score,
    )


def score(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the BLEU of translations against one reference each, 0 to 100.

    It is sacrebleu's (Post, 2018) with its default tokenization, 13a.
    """
    from sacrebleu.metrics import BLEU  # 0.3 s to import: only when it is needed

    # forced: a model may well write a space before each of its full stops
    bleu = BLEU(force=True).corpus_score(list(hypotheses), [list(references)])
    return {"bleu": float(bleu.score)}


def _unpack(
    batch: Batch, decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, str]]:
    """The (source, target) texts of the rows that count, row by row."""
    batch = {name: np.asarray(array) for name, array in batch.items()}
    counts = batch.get("weight", np.ones(len(batch["source"]))) > 0
    pairs = []
    for row in np.flatnonzero(counts):
        source, source_segment, label, target_segment = (
            batch[name][row]
            for name in ("source", "source_segment", "label", "target_segment")
        )
        for segment in range(1, int(source_segment.max(initial=0)) + 1):
            pairs.append(
                (
                    decode(source[source_segment == segment].tolist()),
                    decode(label[target_segment == segment].tolist()),
                )
            )
    return pairs


def _check(facts: Mapping[str, Any], label_smoothing: float) -> None:
    """A translation needs packed pairs, and how many tokens there are."""
    problems = [
        problem
        for names in (SOURCE, TARGET)
        if (problem := _problem_of_rows(facts["arrays"], names))
    ]
    size = facts.get("vocab_size")
    if without := tokens.vocabulary_problems(facts):
        problems += without
        size = tokens.LARGEST_VOCABULARY  # to judge the specials by
    specials = facts.get("specials")
    if facts.get("tokenizer") is not None and not _are_specials(specials, size):
        problems.append(
            f"data: must have 'specials' in the facts, different tokens for"
            f" {', '.join(SPECIALS)}, got {specials!r}. Give their numbers."
        )
    if type(label_smoothing) not in (int, float) or not 0 <= label_smoothing < 1:
        problems.append(
            f"label_smoothing: must be in [0, 1), got {label_smoothing!r}. Take 0 for"
            " none."
        )
    raise_all(problems)


def _problem_of_rows(arrays: Mapping[str, Any], names: Sequence[str]) -> str:
    """What is wrong with the arrays of one side; "" where nothing is."""
    there = [arrays[name] for name in names if name in arrays]
    shapes = {tuple(array["shape"]) for array in there}
    integer = all("int" in array["dtype"] for array in there)
    one_axis = len(shapes) == 1 and len(*shapes) == 1 and min(*shapes) >= 2
    if len(there) == len(names) and integer and one_axis:
        return ""
    shown = {
        name: f"{arrays[name]['dtype']} {arrays[name]['shape']}"
        for name in names
        if name in arrays
    }
    return (
        f"data: must have {', '.join(map(repr, names))}, integers in rows of one length"
        f" of at least 2, got {shown or sorted(arrays)}. Take the data set"
        " 'sentence_pairs', or return them from a function of your own."
    )


def _are_specials(specials: Any, vocab_size: int) -> bool:
    if not isinstance(specials, Mapping) or set(specials) != set(SPECIALS):
        return False
    ids = list(specials.values())
    whole = all(type(n) is int and 0 <= n < vocab_size for n in ids)
    return whole and len(set(ids)) == len(ids)
