"""Schedules and optimizers by name: the mathematics, and what is refused."""

import math

import numpy as np
import pytest

from lowrank_jax.errors import UserError
from train import optim

SPEC = {
    "name": "sgd",
    "args": {},
    "learning_rate": 0.1,
    "schedule": {"name": "constant", "args": {"warmup_steps": 0}},
    "weight_decay": 0.0,
    "decayed": ".*",
    "decay_columns": "all",
    "clip_norm": 0.0,
}


@pytest.mark.parametrize(
    "fractions", [(), (0.5,), (0.5, 0.75), (0.55, 0.55), (0.51, 0.52, 0.93), (0.0, 0.9)]
)
def test_steps_multiply_at_each_fraction(fractions):
    """A factor for each fraction that is over, also where two fall on one step."""
    schedule = optim.steps(2.0, 10, factor=0.1, at_fractions=list(fractions))
    for step in range(12):
        passed = sum(step >= int(10 * fraction) for fraction in fractions)
        np.testing.assert_allclose(schedule(step), 2 * 0.1**passed, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, "0.1", None, True])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm"])
def test_numbers_that_are_none_are_refused(name, value):
    """When the optimizer is built, before anything runs; 0 is allowed."""
    message = rf"^{name}: must be a finite number of at least 0, got {value!r}\. Give"
    with pytest.raises(UserError, match=message):
        optim.Optimizer.build({**SPEC, name: value})
    optim.Optimizer.build({**SPEC, name: 0.0})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("steps", {"factor": -1.0, "at_fractions": [0.5]}, "factor: must be a finite"),
        ("steps", {"factor": 0.1, "at_fractions": [1.5]}, r"at_fractions: must be in"),
        ("steps", {"factor": 0.1, "at_fractions": [math.nan]}, "at_fractions: must be"),
        (
            "cosine",
            {"warmup_steps": 0, "final_fraction": math.nan},
            "final_fraction: must be a finite",
        ),
    ],
)
def test_schedules_that_would_go_wrong_are_refused(name, args, message):
    """By the argument's name."""
    spec = {**SPEC, "schedule": {"name": name, "args": args}}
    with pytest.raises(UserError, match=f"^schedule: {message}"):
        optim.Optimizer.build(spec)
