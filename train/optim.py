"""Optimizers and schedules by name."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import registry

OPTIMIZERS = {
    "adafactor": "optax:adafactor",
    "adam": "optax:adam",
    "adamw": "optax:adamw",
    "lamb": "optax:lamb",
    "lion": "optax:lion",
    "sgd": "optax:sgd",
}

SCHEDULES = {
    "constant": "train.optim:constant",
    "cosine": "train.optim:cosine",
    "steps": "train.optim:steps",
}


def constant(peak: float, total_steps: int, *, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up, then one learning rate."""
    del total_steps
    if not warmup_steps:
        return optax.constant_schedule(peak)
    return optax.warmup_constant_schedule(0.0, peak, warmup_steps)


def cosine(
    peak: float, total_steps: int, *, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to a fraction of the peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak,
        peak,
        min(warmup_steps, total_steps - 1),
        total_steps,
        peak * final_fraction,
    )


def steps(
    peak: float, total_steps: int, *, factor: float, at_fractions: list[float]
) -> optax.Schedule:
    """The learning rate times a factor at each of these fractions of the phase."""
    boundaries = {int(total_steps * fraction): factor for fraction in at_fractions}
    return optax.piecewise_constant_schedule(peak, boundaries)


def make_optimizer(
    spec: Mapping[str, Any], total_steps: int, *, where: str
) -> optax.GradientTransformation:
    """The optimizer of a phase.

    Decay acts on the parameters whose path matches `spec["decayed"]` (kernels and
    factors by default, not biases and norms): inside the optimizer where it is
    decoupled (AdamW), as an addition to the gradient elsewhere (SGD). Clipping is by
    the global norm.

    Args:
      spec: The phase's `optimizer`.
      total_steps: Length of the phase, for the schedule.
      where: What to call the place in errors.
    """
    with errors.at(f"config.{where}.schedule"):
        schedule = registry.build(
            spec["schedule"], SCHEDULES, spec["learning_rate"], total_steps
        )
    with errors.at(f"config.{where}"):
        factory = registry.resolve(spec["name"], OPTIMIZERS, allow_imports=None)
    options = inspect.signature(factory).parameters
    args = {"learning_rate": schedule, **spec["args"]}
    mask = _decay_mask(spec["decayed"], where)
    chain = []
    if spec["clip_norm"]:
        chain.append(optax.clip_by_global_norm(spec["clip_norm"]))
    if "weight_decay" in options:
        args["weight_decay"] = spec["weight_decay"]
        if "mask" in options:
            args["mask"] = mask
    elif spec["weight_decay"]:
        chain.append(optax.add_decayed_weights(spec["weight_decay"], mask))
    with errors.at(f"config.{where}"):
        chain.append(registry.call(factory, **args))
    return optax.chain(*chain)


def pattern(text: str, where: str) -> re.Pattern[str]:
    """A pattern for whole parameter paths, from a config.

    Raises:
      ValueError: It is not a regular expression.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"config.{where}: must be a regular expression, got {text!r}"
            f" ({error}). Correct it."
        ) from error


def _decay_mask(text: str, where: str) -> Callable[[Any], Any]:
    """Which parameters decay: those whose whole path matches."""
    compiled = pattern(text, f"{where}.decayed")

    def decays(key_path: Any, leaf: Any) -> bool:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return compiled.fullmatch(key) is not None

    return lambda params: jax.tree.map_with_path(decays, params)
