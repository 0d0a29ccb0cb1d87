"""Language model: every token is predicted from those before it.

Letters: `b` batch, `t` tokens, `o` vocabulary.
"""

from collections.abc import Mapping
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


def language_model(facts: Mapping[str, Any]) -> Task:
    """Makes the task of a data set of windows of a text.

    It has "tokens" (t + 1,), of which each but the first is predicted from those before
    it in the window, and may have "length" (), how many of these t count: the last
    window of a text is padded. Models map tokens (b, t) to logits (b, t, o). A pupil
    learns the cross-entropy with its teacher's softmax, token by token.

    Args:
      facts: The data set's facts: "vocab_size", and "tokenizer" if text is to be
        written and bits per character are to be counted.

    Raises:
      UserError: Arrays that are none of a text's; all that is missing at once.
    """
    _check_facts(facts)
    context = facts["arrays"]["tokens"]["shape"][0] - 1
    about = facts.get("tokenizer")
    tokenizer = None if about is None else tokenizers.from_facts(about)
    tokens.check_size(facts, tokenizer)

    def inputs(batch: Batch, key: PRNGKeyArray | None) -> tuple[Int[Array, "b t"]]:
        del key  # nothing is augmented
        return (batch["tokens"][:, :-1].astype(jnp.int32),)

    def labels(batch: Batch) -> tokens.Labels:
        targets = batch["tokens"][:, 1:].astype(jnp.int32)
        length = batch.get("length", jnp.full(len(targets), context))
        return targets, jnp.arange(context)[None] < length[:, None]

    return Task(
        model_args={"vocab_size": facts["vocab_size"], "context": context},
        example=(jax.ShapeDtypeStruct((1, 1), jnp.int32),),
        inputs=inputs,
        **tokens.judging(
            labels,
            facts["vocab_size"],
            characters=None if tokenizer is None else tokenizer.lengths(),
        ),
        headline="loss",
        higher_is_better=False,
        unit="token",
        generation=None if tokenizer is None else _generation(tokenizer, context),
    )


def _generation(tokenizer: tokenizers.Tokenizer, context: int) -> Generation:
    """Goes on with a prompt without end; of a full window, half is kept."""

    def encode(text: str) -> dict[str, np.ndarray]:
        ids = np.asarray(tokenizer.encode(text), np.int32)
        if not 1 <= len(ids) <= context:
            raise UserError(
                f"must have 1 to {context} tokens, which is the model's context, got"
                f" {len(ids)}. {'Shorten it' if len(ids) else 'Write something'}."
            )
        return {"tokens": ids}

    def begin(
        model: nnx.Module, arrays: Mapping[str, Array]
    ) -> tuple[Float[Array, "b o"], Any]:
        prompt = arrays["tokens"]
        logits, cache = model.decode(prompt, model.init_cache(len(prompt)))
        return logits[:, -1], cache

    def extend(
        arrays: Mapping[str, np.ndarray], written: np.ndarray
    ) -> dict[str, np.ndarray]:
        window = np.concatenate([arrays["tokens"], written])
        return {"tokens": window[-max(1, context // 2) :].astype(np.int32)}

    return Generation(
        encode=encode,
        begin=begin,
        decode=tokenizer.decode,
        stop=None,
        limit=context,
        needs=("init_cache", "decode"),
        extend=extend,
    )


def _check_facts(facts: Mapping[str, Any]) -> None:
    """A language model needs windows of tokens, and how many tokens there are."""
    arrays, problems = facts["arrays"], []
    window = arrays.get("tokens")
    one_axis = window and len(window["shape"]) == 1 and "int" in window["dtype"]
    if not one_axis or window["shape"][0] < 2:
        problems.append(
            "data: must have 'tokens', windows of at least two integers, got"
            f" {window or sorted(arrays)}. Take the data set 'text_windows', or return"
            " them from a function of your own."
        )
    length = arrays.get("length")
    if length and (length["shape"] != [] or "int" not in length["dtype"]):
        problems.append(
            "data: 'length' must be one integer for each window, got"
            f" {length}. Give how many of its tokens are to be predicted."
        )
    problems += tokens.vocabulary_problems(facts)
    raise_all(problems)
