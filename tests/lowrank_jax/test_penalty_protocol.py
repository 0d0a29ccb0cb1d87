"""Penalties with and without a state: one form, and no memory but the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from spectra import arrays, single

from lowrank_jax import penalties
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import (
    CheckedPenalty,
    StatefulPenalty,
    carry,
    check_stateless,
    stateful,
)


def moving_mean() -> StatefulPenalty:
    """A toy whose state is the mean of `u` so far."""

    def init(model):
        return {path: f.u[...] for path, f in find_factors(model).items()}

    def apply(model, state, step):
        mean = {p: (f.u[...] + state[p]) / 2 for p, f in find_factors(model).items()}
        return sum(jnp.sum(jnp.square(u)) for u in mean.values()), mean

    return StatefulPenalty(init, apply)


def keeps_a_tracer() -> Callable[..., Any]:
    """The weights of the first call, kept for all others."""
    memory = {}

    def penalty(model, step=0):
        squares = [jnp.sum(f.u[...] ** 2) for f in find_factors(model).values()]
        return sum(squares) * memory.setdefault("weights", 1 / sum(squares))

    return penalty


def returns_the_last_value() -> Callable[..., Any]:
    """Read before it is written, and given out as it is."""
    memory = {}

    def penalty(model, step=0):
        value = sum(jnp.sum(f.u[...]) for f in find_factors(model).values())
        last, memory["last"] = memory.get("last", value), value
        return last

    return penalty


def counts_calls() -> Callable[..., Any]:
    """A schedule that counts its calls instead of the steps."""
    calls = []

    def penalty(model, step=0):
        calls.append(step)
        return jnp.float32(len(calls))

    return penalty


class KeepsAnArray:
    """An attribute instead of a state, in a penalty that has one."""

    def __init__(self):
        self.weights = np.ones(3, np.float32)

    def init(self, model):
        return jnp.float32(0)

    def apply(self, model, state, step):
        self.weights = self.weights / 2
        return jnp.sum(jnp.asarray(self.weights)), state


@pytest.mark.parametrize(
    "make_penalty", [keeps_a_tracer, returns_the_last_value, counts_calls, KeepsAnArray]
)
def test_a_penalty_that_keeps_something_is_refused(make_penalty):
    """In jit it runs without error and does nothing; concrete and abstract models."""
    model = Factors(**single(arrays(0, False)))
    for given in (model, nnx.eval_shape(lambda: model)):
        with pytest.raises(UserError, match=r"penalty: .*init\(model\).*apply\(model"):
            check_stateless(make_penalty(), given)
    used = make_penalty()
    run = getattr(used, "apply", lambda model, state, step: used(model, step))
    layer = single(arrays(0, False))  # in a step no error: the control
    jax.jit(lambda layer: run(Factors(**layer), jnp.float32(0), 0))(layer)
    with pytest.raises(UserError, match="penalty: .*keeps"):
        check_stateless(used, model)


def test_honest_penalties_with_a_state_pass():
    """And one in an object of one's own, as `stateful` takes it."""
    model = Factors(**single(arrays(0, False)))
    check_stateless(moving_mean(), model)
    check_stateless(lambda model, step=0: jnp.float32(step), model)
    state = moving_mean().init(model)
    value, new = stateful(moving_mean()).apply(model, state, 1)
    np.testing.assert_allclose(value, jnp.sum(jnp.square(model.u[...])), rtol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    model.cut(1)
    assert carry(moving_mean(), state, model)[""].shape == (4, 1)  # anew


@pytest.mark.parametrize(
    "constant",
    [
        np.array([1.0, np.nan], np.float32),
        np.array([1.0, np.nan]).astype(jnp.bfloat16),
        np.array([True, False]),
        np.arange(2),
    ],
    ids=lambda constant: constant.dtype.name,
)
def test_constants_made_anew_are_the_same(constant):
    """NaN among them, which equals nothing; other numbers are something kept."""
    model, calls = Factors(**single(arrays(0, False))), []

    def fresh(model, step=0):
        return jnp.float32(0) + jnp.nansum(jnp.array(constant.copy()))

    def counted(model, step=0):
        calls.append(step)
        return jnp.nansum(jnp.array(constant + constant.dtype.type(len(calls) % 2)))

    check_stateless(lambda model, step=0: jnp.float32(fresh(model)), model)
    with pytest.raises(UserError, match="keeps something"):
        check_stateless(counted, model)


def test_keys_made_anew_are_the_same():
    """Typed keys are no arrays of NumPy."""
    number = iter(range(9))
    for seed, refused in ((lambda: 3, False), (lambda: next(number), True)):

        def noise(model, step=0, seed=seed):
            with jax.ensure_compile_time_eval():
                key = jax.random.key(seed())
            return jax.random.normal(key, ())

        model = Factors(**single(arrays(0, False)))
        if not refused:
            check_stateless(noise, model)
            continue
        with pytest.raises(UserError, match="keeps something"):
            check_stateless(noise, model)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_other_mistakes_of_the_second_trace_are_not_ours(error):
    """Only a leaked array is something kept; a bug of the user's keeps its type."""
    calls = []

    def penalty(model, step=0):
        calls.append(step)
        if len(calls) > 1:
            raise error("the file is gone")
        return jnp.float32(0)

    with pytest.raises(error, match="^the file is gone"):
        check_stateless(penalty, nnx.Dict())


def test_a_check_of_ones_own_comes_before_the_trace():
    """Of a function with one, and of an object with a state."""

    def check(model):
        raise UserError("weights: must be there, got none. Add them.")

    def penalty(model, step=0):
        raise AssertionError("traced")

    objects = [
        CheckedPenalty(penalty, check),
        StatefulPenalty(lambda model: (), penalty, check=check),
    ]
    for checked in objects:
        assert stateful(checked).check is check
        with pytest.raises(UserError, match="^penalty: weights: must be there"):
            check_stateless(checked, nnx.Dict())


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda m, s, n: (jnp.zeros(2), s), r"must be a scalar, got shape \(2,\)"),
        (lambda m, s, n: (jnp.float32(0), (s, s)), "apply must return a state"),
        (lambda m, s, n: (jnp.float32(0), s + 1.5), "apply must return a state"),
    ],
)
def test_what_a_penalty_returns_is_checked(apply, message):
    """A scalar, and a state that goes out as it came in."""
    penalty = StatefulPenalty(lambda model: jnp.int32(0), apply)
    with pytest.raises(UserError, match=message):
        check_stateless(penalty, nnx.Dict())


def test_a_function_gets_the_empty_state():
    """`stateful` of a plain penalty; one with a state stays what it is."""
    lasso, model = penalties.group_lasso(weight=2), Factors(**single(arrays(0, False)))
    penalty = stateful(lasso)
    assert penalty.init(model) == () and carry(penalty, (), model) == ()
    value, state = penalty.apply(model, (), jnp.int32(3))
    assert value == lasso(model) and state == ()
    assert stateful(moving := moving_mean()) == moving
