"""A translation model whose text is known, and sentences for it.

It writes each sentence as it stands, as well as its one matrix, the identity, can tell
the tokens apart: at lower ranks some of them are lost. Each symbol is a word of its own
in BLEU's tokenization.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import support
from flax import nnx

from configs import common
from lowrank_jax import checkpoint
from train.run import open_run

SYMBOLS = "!#$%(*/:;?"
SPLITS = {"train": 40, "validation": 5, "test": 20}
LENGTH = 16
"""Tokens of a row, of two or three sentences."""


class Cache(NamedTuple):
    """What is to be copied, and how much of it was."""

    source: jax.Array
    position: jax.Array


class Copying(nnx.Module):
    """Writes the source; `table` maps each token to its logits."""

    def __init__(self, vocab_size: int, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.table = nnx.Linear(
            vocab_size,
            vocab_size,
            use_bias=False,
            kernel_init=lambda key, shape, dtype: 20 * jnp.eye(*shape, dtype=dtype),
            rngs=rngs,
        )

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        source_segment: jax.Array,
        target_segment: jax.Array,
    ) -> jax.Array:
        places = [
            jnp.stack([segment, _places(segment)], -1)
            for segment in (source_segment, target_segment)
        ]
        same = (places[1][:, :, None] == places[0][:, None]).all(-1)
        return self._logits(jnp.take_along_axis(source, same.argmax(-1), axis=1))

    def start(self, source: jax.Array, source_segment: jax.Array) -> Cache:
        return Cache(source, jnp.int32(0))

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        here = jax.lax.dynamic_slice_in_dim(
            cache.source, cache.position, tokens.shape[1], 1
        )
        position = cache.position + tokens.shape[1]
        return self._logits(here), cache._replace(position=position)

    def _logits(self, tokens: jax.Array) -> jax.Array:
        return self.table(jax.nn.one_hot(tokens, self.vocab_size))


def _places(segment: jax.Array) -> jax.Array:
    """How many tokens of its own segment stand before each."""
    same = segment[:, :, None] == segment[:, None]
    return jnp.tril(same, -1).sum(-1)


def build(
    *, vocab_size: int, source_length: int, target_length: int, rngs: nnx.Rngs
) -> Copying:
    """Builds it."""
    del source_length, target_length
    return Copying(vocab_size, rngs)


def sentences(count: int, seed: int) -> list[str]:
    """Draws sentences of 4 to 7 different symbols."""
    rng = np.random.default_rng(seed)
    return [
        "".join(rng.permutation(list(SYMBOLS))[: rng.integers(4, 8)])
        for _ in range(count)
    ]


def write_texts(folder: Path, splits: dict[str, int]) -> dict[str, list[str]]:
    """Writes files of sentences that translate to themselves; returns paths by
    split."""
    paths = {}
    for seed, (split, count) in enumerate(splits.items()):
        file = folder / f"{split}.txt"
        file.write_text("".join(f"{line}\n" for line in sentences(count, seed)))
        paths[split] = [str(file)] * 2
    return paths


def make_config(
    folder: Path, *, splits: dict[str, int] | None = None, **changes: Any
) -> dict[str, Any]:
    """A config that copies the sentences of new files in a folder."""
    phase = common.phase(
        name="only",
        until={"steps": 1},
        optimizer=common.optimizer("adam", learning_rate=1e-3),
    )
    args = {
        "text": write_texts(folder, splits or SPLITS),
        "source": "this",
        "target": "same",
        "tokenizer": {"name": "characters", "args": {}},
        "source_length": LENGTH,
        "target_length": LENGTH,
    }
    data = common.data("sentence_pairs", batch_size=8, validation_examples=0, args=args)
    model = {"name": "copying:build", "args": {}}
    config = support.make_config(phase, model=model)
    config["data"] = {**data, "eval_batch_size": 4}
    config["task"] = {"name": "translation", "args": {}}
    return {**config, **changes}


def save_untrained(config: dict[str, Any], path: Path) -> Path:
    """Writes the checkpoint of a config's model as it is before any step."""
    run = open_run(config)
    checkpoint.save(path, run.fresh_model(), step=0, metadata=run.metadata())
    return path
