"""Optimizers and schedules by name."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.rules import compile_pattern
from train import registry
from train.schema import NAMED

OPTIMIZERS = {
    "adafactor": "optax:adafactor",
    "adam": "optax:adam",
    "adamw": "optax:adamw",
    "lamb": "optax:lamb",
    "lion": "optax:lion",
    "sgd": "optax:sgd",
}

SCHEMA = {
    "name": str,
    "args": dict,
    "learning_rate": float,
    "schedule": NAMED,
    "weight_decay": float,
    "decayed": str,
    "decay_columns": str,
    "clip_norm": float,
}
"""What the config of an optimizer must hold; decay_columns is "all", or "active" for
those alone that a pass of the step uses."""

SCHEDULES = {
    "constant": "train.optim:constant",
    "cosine": "train.optim:cosine",
    "steps": "train.optim:steps",
}


def constant(peak: float, total_steps: int, *, warmup_steps: int) -> optax.Schedule:
    """Warms up linearly, then keeps one learning rate."""
    del total_steps
    check_magnitude("warmup_steps", warmup_steps)
    if not warmup_steps:
        return optax.constant_schedule(peak)
    return optax.warmup_constant_schedule(0.0, peak, warmup_steps)


def cosine(
    peak: float, total_steps: int, *, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Warms up linearly, then falls by half a cosine to a fraction of the peak."""
    check_magnitude("warmup_steps", warmup_steps)
    check_magnitude("final_fraction", final_fraction)
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
    """Multiplies the learning rate by a factor at each of these fractions.

    Fractions that fall on one step each count.
    """
    check_magnitude("factor", factor)
    boundaries: dict[int, float] = {}
    for fraction in at_fractions:
        if not 0 <= fraction <= 1:
            raise UserError(
                f"at_fractions: must be in [0, 1], got {fraction}. Give fractions of"
                " the phase."
            )
        step = int(total_steps * fraction)
        boundaries[step] = boundaries.get(step, 1.0) * factor
    return optax.piecewise_constant_schedule(peak, boundaries)


class Optimizer(NamedTuple):
    """An optimizer whose schedule waits for the length of its phase.

    Args:
      spec: Its config, of `SCHEMA`.
    """

    spec: Mapping[str, Any]

    @classmethod
    def build(cls, spec: Mapping[str, Any]) -> "Optimizer":
        """Checks the config of an optimizer, and makes it once for the check.

        Raises:
          UserError: A learning rate, decay or norm that is negative or not finite, a
            wrong pattern, or arguments that the schedule or the optimizer does not
            take.
        """
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_magnitude(name, spec[name])
        if spec["decay_columns"] not in ("all", "active"):
            raise UserError(
                "decay_columns: must be 'all' or 'active', got"
                f" {spec['decay_columns']!r}. Choose one."
            )
        optimizer = cls(spec)
        optimizer._try()
        return optimizer

    @property
    def decays(self) -> bool:
        """Returns whether there is weight decay."""
        return self.spec["weight_decay"] > 0

    @property
    def decayed(self) -> str:
        """Returns the pattern of the parameters that decay."""
        return self.spec["decayed"]

    @property
    def decays_masked(self) -> bool:
        """Returns whether columns decay that no pass of the step uses."""
        return self.spec["decay_columns"] == "all"

    def continues(self, before: "Optimizer") -> bool:
        """Returns whether the state of another optimizer is one of this."""
        same = ("name", "args", "weight_decay", "decayed", "clip_norm")
        return all(self.spec[key] == before.spec[key] for key in same)

    def _try(self) -> None:
        """Makes it for two steps, and traces one; what optax refuses is a mistake in
        the arguments, what the user's own function raises is not."""
        params = {"u": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        name, args = self.spec["name"], self.spec["args"]
        try:
            optimizer = self.make(total_steps=2)
            state = jax.eval_shape(optimizer.init, params)
            jax.eval_shape(optimizer.update, params, state, params)
        except UserError:
            raise
        except (ArithmeticError, TypeError, ValueError) as error:
            if name not in OPTIMIZERS:
                raise
            raise UserError(
                f"args: must be values that {name} can compute with, got {args}"
                f" ({str(error).splitlines()[0]}). Correct them."
            ) from error

    def make(self, total_steps: int) -> optax.GradientTransformation:
        """Makes the optimizer for a phase of so many steps.

        Decay acts on the parameters whose path matches `decayed` (kernels and factors
        by default, not biases and norms): inside the optimizer where it is decoupled
        (AdamW), as an addition to the gradient elsewhere (SGD). Clipping is by the
        global norm.
        """
        spec = self.spec
        with errors.at("schedule"):
            schedule = registry.build(
                spec["schedule"], SCHEDULES, spec["learning_rate"], total_steps
            )
        factory = registry.resolve(spec["name"], OPTIMIZERS, allow_imports=None)
        options = inspect.signature(factory).parameters
        args = {"learning_rate": schedule, **spec["args"]}
        mask = _decay_mask(spec["decayed"])
        chain = []
        if spec["clip_norm"]:
            chain.append(optax.clip_by_global_norm(spec["clip_norm"]))
        if "weight_decay" in options:
            args["weight_decay"] = spec["weight_decay"]
            if "mask" in options:
                args["mask"] = mask
        elif spec["weight_decay"]:
            chain.append(optax.add_decayed_weights(spec["weight_decay"], mask))
        chain.append(registry.call(factory, **args))
        return optax.chain(*chain)


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out the default arguments of an optimizer and of its schedule."""
    supplied = ("learning_rate", "weight_decay", "mask")
    named = registry.complete(
        {"name": spec["name"], "args": spec["args"]}, OPTIMIZERS, supplied=supplied
    )
    with errors.at("schedule"):
        schedule = registry.complete(spec["schedule"], SCHEDULES, positional=2)
    return {**spec, **named, "schedule": schedule}


def check_magnitude(name: str, value: float) -> None:
    """Raises UserError unless a value is a number from 0 up, and finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise UserError(
            f"{name}: must be a finite number of at least 0, got {value!r}. Give one."
        )


def _decay_mask(text: str) -> Callable[[Any], Any]:
    """Makes the mask of what decays: parameters whose whole path matches."""
    with errors.at("decayed"):
        compiled = compile_pattern(text)

    def decays(key_path: Any, leaf: Any) -> bool:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return compiled.fullmatch(key) is not None

    return lambda params: jax.tree.map_with_path(decays, params)
