"""Optimizer states that go on where a kernel became factors, and schedules anew.

Cutting a state is in `test_shrinking.py`. Letters: m a momentum of W = u v.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax.factorization import factorize
from lowrank_jax.optimizer_state import convert_opt_state, restart_schedules
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import merge

RANDOM = np.random.default_rng(0)
BETA = 0.9
SCHEDULE = optax.polynomial_schedule(0.5, 0.01, 1, transition_steps=20)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


DENSE = {"w": draw(5, 4), "bias": draw(4)}
FACTORED = {"u": draw(5, 3), "v": draw(3, 4), "bias": draw(4)}
GRADIENTS = [{"w": draw(5, 4), "bias": draw(4)} for _ in range(4)]


def to_dense(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"w": params["u"] @ params["v"], "bias": params["bias"]}


def run(optimizer, params: Any, gradients: list[Any], state: Any = None) -> Any:
    """The state after these gradients."""
    state = optimizer.init(params) if state is None else state
    for gradient in gradients:
        _, state = optimizer.update(gradient, state, params)
    return state


def convert(optimizer) -> tuple[Any, Any, list[str]]:
    """A dense state after some steps, and what becomes of it."""
    old = run(optimizer, DENSE, GRADIENTS)
    fresh = optimizer.init(FACTORED)
    new, restarted = convert_opt_state(old, fresh, to_dense, FACTORED)
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(fresh), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return old, new, restarted


def part(state: Any, kind: type) -> Any:
    """The one state of a type inside a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    found = [leaf for leaf in leaves if isinstance(leaf, kind)]
    assert len(found) == 1
    return found[0]


def chained(*scalings: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(jnp.ndim, p)),
        *scalings,
        optax.scale_by_learning_rate(SCHEDULE),
    )


LINEAR = {
    "momentum": (optax.sgd(0.1, momentum=BETA), optax.TraceState, "trace"),
    "nesterov": (
        optax.sgd(0.1, momentum=BETA, nesterov=True),
        optax.TraceState,
        "trace",
    ),
    "lion": (optax.lion(0.1), optax.ScaleByLionState, "mu"),
    "momentum in a chain": (chained(optax.trace(BETA)), optax.TraceState, "trace"),
    "lion in a chain": (
        chained(optax.scale_by_lion()),
        optax.ScaleByLionState,
        "mu",
    ),
    "momentum by name": (
        optax.named_chain(("clip", optax.clip(1.0)), ("m", optax.trace(BETA))),
        optax.TraceState,
        "trace",
    ),
    "half momentum": (
        optax.sgd(0.1, momentum=BETA, accumulator_dtype=jnp.bfloat16),
        optax.TraceState,
        "trace",
    ),
    "half lion": (
        optax.lion(0.1, mu_dtype=jnp.bfloat16),
        optax.ScaleByLionState,
        "mu",
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_momentum_goes_over_by_the_chain_rule(case):
    """m v^T and u^T m; what did not change is unchanged, counters too."""
    optimizer, kind, field = LINEAR[case]
    old, new, restarted = convert(optimizer)
    assert restarted == []
    before, after = (getattr(part(state, kind), field) for state in (old, new))
    m, u, v = (np.float64(x) for x in (before["w"], FACTORED["u"], FACTORED["v"]))
    assert np.all(m != 0)
    accuracy = 1e-6 if after["u"].dtype == jnp.float32 else 1e-2
    assert relative_error(after["u"], m @ v.T) <= accuracy
    assert relative_error(after["v"], u.T @ m) <= accuracy
    np.testing.assert_array_equal(after["bias"], before["bias"], strict=True)
    if kind is optax.ScaleByLionState:
        assert part(new, kind).count == len(GRADIENTS)
    if "chain" in case:
        assert part(new, optax.ScaleByScheduleState).count == len(GRADIENTS)


def test_converted_momentum_is_that_of_fixed_factors():
    """A linear model by SGD with momentum: had the factors of the final W stood in its
    place all the time, their gradients g_t v^T and u^T g_t would have summed to this.

    The controls: with the factors of the first W they do not, nor from zero.
    """
    inputs, targets = np.float64(draw(8, 5)), np.float64(draw(8, 4))

    def loss(params):
        return 0.5 * jnp.mean(jnp.square(inputs @ params["w"] - targets).sum(-1))

    optimizer = optax.sgd(0.1, momentum=BETA)
    params = {"w": draw(5, 4)}
    first, state, history = np.float64(params["w"]), optimizer.init(params), []
    for _ in range(12):
        w = np.float64(params["w"])
        history.append(inputs.T @ (inputs @ w - targets) / len(inputs))
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)

    def factors(w) -> tuple[np.ndarray, np.ndarray]:
        u, s, v = np.linalg.svd(np.float64(w), full_matrices=False)
        return u * np.sqrt(s), np.sqrt(s)[:, None] * v

    def summed(u, v) -> tuple[np.ndarray, np.ndarray]:
        left, right = np.zeros_like(u), np.zeros_like(v)
        for gradient in history:
            left = BETA * left + gradient @ v.T
            right = BETA * right + u.T @ gradient
        return left, right

    u, v = factors(params["w"])
    new = {"u": jnp.float32(u), "v": jnp.float32(v)}
    converted, restarted = convert_opt_state(
        state, optimizer.init(new), lambda p: {"w": p["u"] @ p["v"]}, new
    )
    found, wrong = converted[0].trace, summed(*factors(first))
    for name, expected, other in zip("uv", summed(u, v), wrong, strict=True):
        assert relative_error(found[name], expected) <= 1e-5
        assert relative_error(found[name], other) > 0.1
        assert np.linalg.norm(found[name]) > 0.1
    assert restarted == []


class Net(nnx.Module):
    """A convolution that is factored in depth, a linear layer, and one left dense."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (3, 2), rngs=rngs)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_models_convert_through_merging():
    """As the training loop does it: merge is the function back, folds, scales and
    squares in between included; u^T m v^T for these."""
    dense = Net(nnx.Rngs(0))
    rules = [("conv", {"scheme": 2, "depth": 3}), ("first", {"with_s": True})]
    model = factorize(dense, [*rules, (".*", "dense")])
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.as_pure(params)
    old_params = nnx.as_pure(nnx.state(dense, nnx.Param))
    optimizer = optax.sgd(0.1, momentum=BETA)
    gradients = [jax.tree.map(lambda x: draw(*x.shape), old_params) for _ in range(2)]
    state = run(optimizer, old_params, gradients)

    def to_old(params):
        new = nnx.merge(graph, params, rest, copy=True)
        return nnx.as_pure(nnx.state(merge(new), nnx.Param))

    new, restarted = convert_opt_state(state, optimizer.init(params), to_old, params)
    assert restarted == []
    before = jax.tree.map(np.float64, state[0].trace)
    after = jax.tree.map(np.float64, new[0].trace)
    factors = find_factors(model)
    conv, first = after["conv"]["factors"], after["first"]["factors"]
    u, middle, v = (
        np.float64(part[...])
        for part in (factors["conv"].u, factors["conv"].middle, factors["conv"].v)
    )
    m = before["conv"]["kernel"].transpose(0, 2, 1, 3).reshape(3 * 2, 2 * 3)
    assert relative_error(conv["u"], m @ v.T @ middle[0].T) <= 1e-5
    assert relative_error(conv["middle"][0], u.T @ m @ v.T) <= 1e-5
    assert relative_error(conv["v"], middle[0].T @ u.T @ m) <= 1e-5
    u, s, v = (
        np.float64(part[...])
        for part in (factors["first"].u, factors["first"].s, factors["first"].v)
    )
    m = before["first"]["kernel"]
    assert relative_error(first["u"], m @ v.T * s) <= 1e-5
    assert relative_error(first["s"], np.diag(u.T @ m @ v.T)) <= 1e-5
    assert relative_error(first["v"], (u * s).T @ m) <= 1e-5
    np.testing.assert_array_equal(after["head"]["kernel"], before["head"]["kernel"])
    for layer in ("conv", "first", "head"):
        np.testing.assert_array_equal(after[layer]["bias"], before[layer]["bias"])


class Strange(NamedTuple):
    """A state that the library cannot know."""

    trace: Any


def strange() -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return updates, Strange(jax.tree.map(jnp.add, updates, state.trace))

    return optax.GradientTransformation(
        lambda params: Strange(jax.tree.map(jnp.zeros_like, params)), update
    )


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda leaf: "wide" if leaf.ndim > 1 else "thin", params)


RESTARTED = {
    "adam": (optax.adam(0.1), "ScaleByAdamState"),
    "adam in a chain": (chained(optax.scale_by_adam()), "ScaleByAdamState"),
    "rms": (optax.rmsprop(0.1), "ScaleByRmsState"),
    "masked momentum": (optax.masked(optax.trace(BETA), matrices), "MaskedState"),
    "partitioned": (
        optax.partition(
            {"wide": optax.sgd(0.1, momentum=BETA), "thin": optax.sgd(0.1)}, labels
        ),
        "PartitionState",
    ),
    "several steps": (
        optax.MultiSteps(optax.trace(BETA), 2).gradient_transformation(),
        "MultiStepsState",
    ),
    "unknown": (strange(), "Strange"),
}


@pytest.mark.parametrize("case", RESTARTED)
def test_what_cannot_go_over_starts_anew_and_is_named(case):
    """Squares of gradients are not linear in them; what is unknown is not guessed. A
    momentum and a schedule beside it go on."""
    doubtful, name = RESTARTED[case]
    optimizer = optax.chain(
        optax.trace(BETA), doubtful, optax.scale_by_schedule(SCHEDULE)
    )
    old, new, restarted = convert(optimizer)
    assert restarted == [name]
    leaves = map(jax.tree.leaves, (new[1], doubtful.init(FACTORED)))
    for one, fresh in zip(*leaves, strict=True):
        if "chain" not in case or one.ndim:  # a schedule inside goes on
            np.testing.assert_array_equal(one, fresh, strict=True)
    assert new[2].count == len(GRADIENTS)
    m = np.float64(old[0].trace["w"])
    assert relative_error(new[0].trace["u"], m @ np.float64(FACTORED["v"]).T) <= 1e-6


def test_states_without_arrays_are_not_named():
    """A masked decay has nothing to lose."""
    decay = optax.add_decayed_weights(0.1, mask=matrices)
    _, new, restarted = convert(optax.chain(decay, optax.clip(1.0)))
    assert restarted == [] and not jax.tree.leaves(new)


SCHEDULED = {
    "plain": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=BETA),
    "adam": lambda rate: optax.adam(rate),
    "lion": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_lion(),
        optax.scale_by_learning_rate(rate),
    ),
    "named": lambda rate: optax.named_chain(
        ("adam", optax.scale_by_adam()), ("rate", optax.scale_by_learning_rate(rate))
    ),
    "masked": lambda rate: optax.masked(
        optax.adam(rate), lambda p: jax.tree.map(lambda _: True, p)
    ),
    "partitioned": lambda rate: optax.partition(
        {"wide": optax.sgd(rate, momentum=BETA), "thin": optax.adam(rate)}, labels
    ),
    "several steps": lambda rate: optax.MultiSteps(
        optax.adam(rate), 1
    ).gradient_transformation(),
    "injected": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
}


@pytest.mark.parametrize("case", SCHEDULED)
def test_restarted_schedules_begin_anew_and_moments_go_on(case):
    """The updates are those of the state that goes on, at the first learning rates.

    They are proportional to the learning rate, whatever is in the moments. The
    controls: the state itself goes on at its own rate, and a fresh one has another
    direction (but where there are no moments).
    """
    optimizer, count = SCHEDULED[case](SCHEDULE), len(GRADIENTS)
    old = run(optimizer, DENSE, GRADIENTS)
    new = restart_schedules(old, optimizer.init(DENSE))
    assert jax.tree.structure(new) == jax.tree.structure(old)
    fresh, distances, update = optimizer.init(DENSE), [], jax.jit(optimizer.update)
    for step, gradient in enumerate(GRADIENTS[::-1]):
        continued, old = update(gradient, old, DENSE)
        updates, new = update(gradient, new, DENSE)
        other, fresh = update(gradient, fresh, DENSE)
        factor = float(SCHEDULE(step)) / float(SCHEDULE(count + step))
        assert factor > 1.2
        for name in DENSE:
            expected = factor * np.float64(continued[name])
            assert relative_error(updates[name], expected) <= 1e-5
            assert relative_error(updates[name], continued[name]) > 0.1
            distances.append(relative_error(other[name], expected))
    assert case == "plain" or max(distances) > 0.1


def test_restarting_keeps_all_that_is_no_schedule():
    """Adam's own count is of its moments, not of the schedule."""
    optimizer = optax.adamw(SCHEDULE)
    old = run(optimizer, DENSE, GRADIENTS)
    new = restart_schedules(old, optimizer.init(DENSE))
    jax.tree.map(np.testing.assert_array_equal, new[0], old[0])
    assert new[0].count == len(GRADIENTS) and new[2].count == 0 != old[2].count
    without = optax.sgd(0.1, momentum=BETA)
    state = run(without, DENSE, GRADIENTS)
    same = restart_schedules(state, without.init(DENSE))
    jax.tree.map(np.testing.assert_array_equal, same, state)
