"""One training step by itself, of a small model of images, and its formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from loop_configs import make_config, phase
from support import begin

from configs import common
from lowrank_jax.active import max_ranks, set_ranks
from train.config import to_json
from train.run import open_run
from train.state import new_state
from train.step import make_train_step

named = common.named


def step_parts(model: str, sampler: dict[str, Any], *, parts: int = 1, **changes: Any):
    """Model, structure, state, batch and the step under plain SGD of rate 1."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 8, 8, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, size=6), jnp.int32),
    }
    changes = {"optimizer": common.optimizer("sgd", learning_rate=1.0), **changes}
    only = phase(1, sampler=sampler, **changes)
    config = make_config(only, model=model)
    config["task"]["args"] |= {"mean": [0.0], "std": [1.0]}  # images as they are
    run = open_run(to_json(config))
    network, running = run.fresh_model(), begin(config["phases"][0])
    structure, state = new_state(network, running, 0)
    step = make_train_step(
        structure, running, run.task, jax.random.key(0), accumulation_steps=parts
    )
    return network, structure, state, batch, step


def logits_at(network: nnx.Module, fraction: float, images: Any) -> np.ndarray:
    """Logits in training mode at a fraction of the ranks, in float64."""
    network = nnx.clone(network)
    network.train()
    ranks = {p: -(-r * fraction // 1) for p, r in max_ranks(network).items()}
    set_ranks(network, {path: int(rank) for path, rank in ranks.items()})
    return np.asarray(network(images), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def matryoshka(*fractions: float) -> dict[str, Any]:
    return named("matryoshka", fractions=fractions)


def full_teacher(target_weight: float = 0.0) -> dict[str, Any]:
    return named("full", target_weight=target_weight)
