"""What tasks on text share: every token is judged, padding counts nothing.

Letters: `b` batch, `t` tokens, `o` vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from lowrank_jax.errors import UserError
from train.data.tokenizers import Tokenizer
from train.tasks import base
from train.tasks.base import Batch

Logits = Float[Array, "b t o"]
Labels = tuple[Int[Array, "b t"], Bool[Array, "b t"]]
"""The token to predict at every place, and which places count."""

LARGEST_VOCABULARY = 2**20
"""Beyond it a head is larger than a machine."""


def judging(
    labels: Callable[[Batch], Labels],
    vocab_size: int,
    *,
    characters: Sequence[int] | None,
    label_smoothing: float = 0.0,
) -> dict[str, Callable[..., Any]]:
    """Makes the parts of a task that judge logits (b, t, o): `loss`, `distill`, `sums`
    and `figures`.

    The weight of a token is that of its row, 0 where it does not count; all means are
    over tokens. Figures are "loss" in nats per token, without label smoothing,
    "perplexity" exp(loss), "accuracy", and "bits_per_character", the loss of a text in
    bits over its characters, which does not depend on how it was cut into tokens.

    Args:
      labels: From a batch to what is to be predicted.
      vocab_size: Number of logits, o.
      characters: How many characters each token stands for; None if it is not known,
        for no bits per character.
      label_smoothing: Share of the target that is spread over the vocabulary, in what
        is trained on alone (Szegedy et al., 2016).
    """
    lengths = None if characters is None else np.asarray(characters, np.float32)

    def read(logits: Logits, batch: Batch) -> tuple[Array, Array]:
        targets, counts = labels(batch)
        _check_logits(logits, (*targets.shape, vocab_size))
        rows = batch.get("weight", jnp.ones(len(targets), jnp.float32))
        return targets, rows[:, None] * counts

    def loss(logits: Logits, batch: Batch) -> Float[Array, ""]:
        targets, weight = read(logits, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if label_smoothing:
            # Both targets share the log of the sum, which cancels in their difference.
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
            losses += label_smoothing * (picked[..., 0] - logits.mean(axis=-1))
        return base.mean_by(losses, weight)

    def distill(logits: Logits, teacher: Logits, batch: Batch) -> Float[Array, ""]:
        _, weight = read(logits, batch)
        targets = jax.nn.softmax(teacher)
        return base.mean_by(optax.softmax_cross_entropy(logits, targets), weight)

    def sums(logits: Logits, batch: Batch) -> dict[str, Array]:
        targets, weight = read(logits, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = jnp.argmax(logits, axis=-1) == targets
        values = {"accuracy": hits, "loss": losses}
        if lengths is not None:
            values["characters_per_token"] = jnp.asarray(lengths)[targets]
        sums = {name: jnp.sum(value * weight) for name, value in values.items()}
        return {**sums, "weight": weight.sum()}

    return {"loss": loss, "distill": distill, "sums": sums, "figures": _figures}


def _figures(sums: Mapping[str, Any]) -> dict[str, float]:
    figures = base.figures_per_weight(sums)
    characters = figures.pop("characters_per_token", 0.0)
    loss = figures["loss"]
    # a run that went astray may have a loss whose exp no float holds
    figures["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    if characters:
        figures["bits_per_character"] = loss / characters / math.log(2)
    return figures


def vocabulary_problems(facts: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the number of tokens; nothing if a model can have
    it."""
    size = facts.get("vocab_size")
    if type(size) is int and 1 <= size <= LARGEST_VOCABULARY:
        return []
    return [
        "data: must have 'vocab_size' in the facts, a whole number in [1,"
        f" {LARGEST_VOCABULARY:,}], got {size!r}. Give the number of different tokens."
    ]


def _check_logits(logits: Logits, shape: tuple[int, ...]) -> None:
    """Logits of another width would go through the loss unseen."""
    if logits.shape != shape:
        raise UserError(
            f"model: must map {shape[0]} rows of {shape[1]} tokens to logits {shape},"
            f" got {logits.shape}. Build its head with vocab_size features, one row of"
            " logits a token."
        )


def check_size(facts: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
    """Raises UserError where a tokenizer's tokens are not as many as the data's: one
    that it does not know has no text."""
    if tokenizer is not None and tokenizer.size != facts["vocab_size"]:
        raise UserError(
            f"data: 'vocab_size' must be that of the tokenizer, {tokenizer.size}, got"
            f" {facts['vocab_size']}. Take the tokenizer that made the data."
        )
