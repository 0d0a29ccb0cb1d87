"""Every task with a model for it, and random batches and outputs of it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_package import model as own_model

from train import registry
from train.data import tokenizers
from train.models import encoder_decoder, lenet, transformer
from train.tasks import TASKS
from train.tasks.base import Task

IMAGES = {
    "arrays": {
        "image": {"shape": [16, 18, 2], "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    },
    "num_classes": 5,
}
VECTORS = {
    "arrays": {
        "x": {"shape": [7], "dtype": "float32"},
        "y": {"shape": [5], "dtype": "float32"},
    }
}
PIXELS = {"mean": [100.0, 20.0], "std": [50.0, 60.0]}
AUGMENT = [["random_crop", {"padding": 2}], ["random_flip", {}]]
SIZE = 6


WINDOWS = {
    "arrays": {
        "tokens": {"shape": [8], "dtype": "uint8"},
        "length": {"shape": [], "dtype": "int32"},
    },
    "vocab_size": 5,
    "tokenizer": tokenizers.build(
        {"name": "characters", "args": {}}, ["abcde"]
    ).to_facts(),
}


PAIRS = {
    "arrays": {
        name: {"shape": [8], "dtype": "uint8"}
        for name in ("source", "source_segment", "target", "label", "target_segment")
    },
    "vocab_size": 5,
    "specials": {"pad": 0, "bos": 1, "eos": 2},
    "tokenizer": tokenizers.build(
        {"name": "characters", "args": {}}, ["ab"], reserved=3
    ).to_facts(),
}


class Row(NamedTuple):
    """A task by its name in a config, and a model for it."""

    name: str
    facts: dict[str, Any]
    args: dict[str, Any]
    model: Callable[..., nnx.Module]
    perfect: Callable[[dict[str, Any]], jax.Array]
    """Outputs that nothing can better, of a batch."""
    outputs: tuple[int, ...] = (5,)
    """Shape of the outputs of one example."""
    counted: Callable[[dict[str, Any]], jax.Array] = lambda batch: jnp.ones(SIZE)
    """How much each example weighs beside its own weight."""
    augments: bool = False
    """Whether a key changes the inputs."""


def tokens_right(labels: jax.Array) -> jax.Array:
    return 100.0 * jax.nn.one_hot(labels, 5)


ROWS = {
    "classification": Row(
        "classification",
        IMAGES,
        {**PIXELS, "augment": AUGMENT},
        lenet.build,
        lambda batch: 100.0 * jax.nn.one_hot(batch["label"], 5),
        augments=True,
    ),
    "regression": Row(
        "own_package.task:regression",
        VECTORS,
        {"noise": 0.1},
        own_model.build,
        lambda batch: batch["y"],
        augments=True,
    ),
    "language_model": Row(
        "language_model",
        WINDOWS,
        {},
        functools.partial(transformer.build, depth=1, embed_dim=8, num_heads=2),
        lambda batch: tokens_right(batch["tokens"][:, 1:]),
        outputs=(7, 5),
        counted=lambda batch: batch["length"],
    ),
    "translation": Row(
        "translation",
        PAIRS,
        {},
        functools.partial(
            encoder_decoder.build,
            depth=1,
            embed_dim=8,
            num_heads=2,
            dropout_rate=0.0,
        ),
        lambda batch: tokens_right(batch["label"]),
        outputs=(8, 5),
        counted=lambda batch: (batch["target_segment"] > 0).sum(axis=1),
    ),
}
every_task = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def make(row: Row) -> Task:
    spec = {"name": row.name, "args": row.args}
    return registry.build(spec, TASKS, row.facts, allow_imports=None)


def batch_of(facts: dict[str, Any], size: int, seed: int = 0) -> dict[str, jax.Array]:
    """A random batch of the arrays that the facts name."""
    rng, batch = np.random.default_rng(seed), {}
    for name, array in facts["arrays"].items():
        shape, top = (size, *array["shape"]), 256 if name == "image" else 5
        whole = rng.integers(0, top, shape)
        values = rng.normal(size=shape) if "float" in array["dtype"] else whole
        batch[name] = jnp.asarray(values, array["dtype"])
    return batch


def outputs_of(row: Row, size: int = SIZE, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (size, *row.outputs))
