"""Configs of short phases of 4 steps, and the models that they leave."""

from collections.abc import Mapping
from typing import Any

import support
from flax import nnx

from configs import common
from lowrank_jax import checkpoint
from train.model import load_model

STEPS_PER_EPOCH = 4
named = common.named
SGD = common.optimizer("sgd", learning_rate=0.1, args={"momentum": 0.9})
DENSE_TO_LOW = named("factorize", rules=((".*", "full"),))


def phase(steps: int = 4, **changes: Any) -> dict[str, Any]:
    values = {"name": "only", "until": {"steps": steps}, "optimizer": SGD, **changes}
    return common.phase(**values)


def make_config(
    *of_phases: Mapping[str, Any], rule: Any = "dense", **changes: Any
) -> dict[str, Any]:
    rules = {"rank_rules": ((".*", rule),), "model": named("mlp", hidden=(16,))}
    return support.make_config(*of_phases, **{**rules, **changes})


def load(saved: checkpoint.Saved) -> nnx.Module:
    return load_model(saved, allow_imports=None)
