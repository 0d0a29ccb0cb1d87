"""Someone's own parts of a config, by import path: each has an argument with a default,
and can be given a fault."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lowrank_jax import penalties, projections, samplers
from lowrank_jax.paths import find_factors
from lowrank_jax.samplers import RankSampler
from lowrank_jax.selection.context import Context
from train import actions, teachers
from train.actions import Action
from train.tasks.base import Task
from train.tasks.classification import classification
from train.until import Condition


class Net(nnx.Module):
    """One layer. `deterministic` is what Flax's `eval()` sets."""

    def __init__(self, size: int, num_classes: int, fault: str, rngs: nnx.Rngs):
        self.layer = nnx.Linear(size, num_classes, rngs=rngs)
        self.deterministic, self.fault = False, fault

    def __call__(self, images: jax.Array) -> jax.Array:
        features = images.reshape(len(images), -1)
        if self.fault == "shape" or (self.fault == "evaluation" and self.deterministic):
            features = features[:, 1:]
        if self.fault == "ValueError":
            raise ValueError("my own bug")
        if self.fault == "TypeError":
            raise TypeError("my own bug")
        return self.layer(features)


def net(
    *, image_shape: Sequence[int], num_classes: int, rngs: nnx.Rngs, fault: str = ""
) -> Net:
    return Net(image_shape[0] * image_shape[1], num_classes, fault, rngs)


def task(facts: Mapping[str, Any], *, fault: str = "") -> Task:
    """Classification of digits."""
    plain = classification(facts, mean=[4.88], std=[6.02], augment=[])

    def sums(outputs: Any, batch: Any) -> dict[str, jax.Array]:
        found = plain.sums(outputs, batch)
        if fault == "no weight":
            del found["weight"]
        if fault == "no scalar":
            found["loss"] = found["loss"][None]
        return found

    faulty = plain._replace(sums=sums)
    if fault == "no headline":
        return faulty._replace(headline="bleu")
    if fault == "no loss":
        return faulty._replace(
            figures=lambda sums: {"accuracy": sums["accuracy"] / sums["weight"]}
        )
    return faulty


def sampler(*, smallest: float = 0.5) -> RankSampler:
    return samplers.uniform_fraction(fractions=(smallest, 1.0))


def teacher(*, target_weight: float = 0.5) -> teachers.Teacher:
    return teachers.full(target_weight=target_weight)


def penalty(*, weight: float = 0.01) -> penalties.Penalty:
    return penalties.group_lasso(weight=weight)


def projection(*, stable_rank: float = 2.0) -> Any:
    return projections.stable_rank_normalization(stable_rank=stable_rank)


def condition(*, every_steps: int = 2) -> Condition:
    return Condition(every_steps, lambda model: 0, lambda history: False)


def action(*, rules: Sequence[Any] = ((".*", "full"),)) -> Action:
    return actions.factorize(rules=rules)


def selector(context: Context, *, value: int = 4) -> Mapping[str, Any]:
    return {path: min(rank, value) for path, rank in context.ranks.items()}


def optimizer(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.5
) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=momentum)


def schedule(peak: float, total_steps: int, *, floor: float = 0.0) -> optax.Schedule:
    return optax.linear_schedule(peak, floor, total_steps)


def forgetful_penalty() -> penalties.Penalty:
    """Keeps its first value in a closure, where it is never renewed."""
    kept: list[Any] = []

    def penalty(model: nnx.Module, step: Any = 0) -> jax.Array:
        layers = find_factors(model).values()
        kept.append(sum(jnp.sum(factors.u[...]) for factors in layers))
        return kept[0]

    return penalty


def forgetful_projection() -> Any:
    """Keeps its first factors in a closure."""
    kept: dict[str, Any] = {}

    def project(model: nnx.Module, step: Any = 0) -> None:
        for path, factors in find_factors(model).items():
            factors.u.set_value(kept.setdefault(path, factors.u[...]))

    return project
