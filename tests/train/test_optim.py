"""Schedules and optimizers by name: the mathematics, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from loop_configs import make_config, phase
from reference import relative_error
from support import fresh_model

from configs import common
from lowrank_jax import checkpoint
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


class TestOptimizer:
    @pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "lamb", "lion"])
    def test_kernels_and_factors_decay_biases_and_norms_do_not(self, name):
        """Updates of a step without gradient."""
        rules = (("head", "dense"), (".*", "full"))
        model = fresh_model(make_config(phase(1), model="convnet", rank_rules=rules))
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        spec = common.optimizer(name, learning_rate=0.5, weight_decay=0.1)
        optimizer = optim.Optimizer.build(spec).make(10)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        moved = {key for key, x in checkpoint.flatten(updates).items() if np.any(x)}
        names = {key: key.split("/")[-1] for key in checkpoint.flatten(params)}
        assert set(names.values()) == {"u", "v", "kernel", "bias", "scale"}
        assert moved == {k for k, n in names.items() if n in ("u", "v", "kernel")}
        if name in ("adamw", "sgd"):
            for key in moved:
                update, value = (checkpoint.flatten(t)[key] for t in (updates, params))
                assert relative_error(update, -0.05 * np.asarray(value)) < 1e-6

    def test_clipping_is_by_the_global_norm(self):
        spec = common.optimizer("sgd", learning_rate=1.0, clip_norm=2.0)
        optimizer = optim.Optimizer.build(spec).make(10)
        params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
        for scale, expected in ((1.0, 2 / 3), (0.1, 0.1)):
            gradient = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0])}
            gradient = jax.tree.map(lambda x, scale=scale: scale * x, gradient)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            np.testing.assert_allclose(updates["a"], [-expected, -2 * expected], 1e-6)
            np.testing.assert_allclose(updates["b"], [-2 * expected], 1e-6)

    @pytest.mark.parametrize(
        "name, args, values",
        [
            ("constant", {"warmup_steps": 0}, {0: 2.0, 9: 2.0}),
            ("constant", {"warmup_steps": 4}, {0: 0.0, 2: 1.0, 4: 2.0, 9: 2.0}),
            (
                "cosine",
                {"warmup_steps": 0, "final_fraction": 0.1},
                {0: 2.0, 5: 1.1, 10: 0.2},
            ),
            (
                "cosine",
                {"warmup_steps": 2, "final_fraction": 0.0},
                {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.0, 10: 0.0},
            ),
            (
                "steps",
                {"factor": 0.1, "at_fractions": [0.5, 0.8]},
                {0: 2.0, 4: 2.0, 6: 0.2, 9: 0.02},
            ),
            (  # two fractions that fall on one step
                "steps",
                {"factor": 0.1, "at_fractions": [0.51, 0.59]},
                {4: 2.0, 7: 0.02},
            ),
        ],
    )
    def test_schedules(self, name, args, values):
        """The learning rate of a phase of 10 steps, through an update."""
        schedule = {"name": name, "args": args}
        spec = common.optimizer("sgd", learning_rate=2.0, schedule=schedule)
        optimizer = optim.Optimizer.build(spec).make(10)
        state, found = optimizer.init(jnp.zeros(1)), []
        for _ in range(11):
            update, state = optimizer.update(jnp.ones(1), state, jnp.zeros(1))
            found.append(-float(update[0]))
        for step, value in values.items():
            assert found[step] == pytest.approx(value, abs=1e-6), step
