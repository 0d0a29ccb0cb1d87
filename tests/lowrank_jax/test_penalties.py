"""Penalties: one table with each one's formula in float64 NumPy.

A new penalty is one more row. Values, gradients, stacks, masked models and the
allocated columns are checked for all, and that they keep nothing but their state.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from penalty_rows import ROWS, WEIGHT, evaluate, make
from spectra import arrays, matrices, single

from lowrank_jax import factorize
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import (
    PENALTIES,
    carry,
    check_stateless,
    stateful,
)

CASES = [
    pytest.param(name, with_s, id=f"{name}-{'usv' if with_s else 'uv'}")
    for name, row in ROWS.items()
    for with_s in row.kinds()
]


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def value_of(name: str, layers, step=0) -> jax.Array:
    return evaluate(name, model_of(layers), step)


def model_of(layers) -> nnx.Module:
    return nnx.Dict({str(n): Factors(**parts) for n, parts in enumerate(layers)})


def reference(formula: Callable[..., float], layers) -> float:
    return WEIGHT * sum(
        formula(*matrix) for parts in layers for matrix in matrices(parts)
    )


def test_every_penalty_has_a_row():
    """A penalty without a row would be untested."""
    assert list(ROWS) == list(PENALTIES)


@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_value_and_gradient_equal_the_formula(name, with_s):
    """In float64, the gradient by central differences; stacks are sums over matrices,
    layers with and without `s` may be mixed."""
    row = ROWS[name]
    other = with_s or row.needs_s
    layers = [arrays(0, with_s), arrays(1, with_s, (2,)), arrays(2, other, (2, 1))]
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, layers)
        run = jax.jit(jax.value_and_grad(lambda layers: value_of(name, layers)))
        value, gradient = run(inputs)
        assert value.dtype == jnp.float64 and value.shape == ()
        np.testing.assert_allclose(value, reference(row.reference, layers), rtol=1e-12)
        slope_of = row.slope_of or row.reference
        for layer, found in zip(layers, gradient, strict=True):
            for key, array in layer.items():
                expected = np.zeros_like(array)
                for index in np.ndindex(array.shape):
                    keep, ends = array[index], []
                    for nudge in (1e-5, -1e-5):
                        array[index] = keep + nudge
                        ends.append(reference(slope_of, [layer]))
                    array[index] = keep
                    expected[index] = (ends[0] - ends[1]) / 2e-5
                error = np.linalg.norm(found[key] - expected)
                assert error <= 1e-7 * max(np.linalg.norm(expected), 1e-2), key


@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_value_is_a_float32_scalar_and_layers_without_columns_are_nothing(name, with_s):
    """With a traced step as with a plain one, and beside a layer of rank 0."""
    layer = single(arrays(0, with_s))
    value = value_of(name, [layer])
    assert value.dtype == jnp.float32 and value.shape == ()
    expected = reference(ROWS[name].reference, [arrays(0, with_s)])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    empty = Factors(**single(arrays(0, with_s, sizes=(4, 0, 2))))
    model = nnx.Dict({"0": Factors(**layer), "empty": empty})
    penalty = stateful(make(name, ["0"]))
    traced = jax.jit(lambda step: penalty.apply(model, penalty.init(model), step)[0])(0)
    np.testing.assert_allclose(traced, value, rtol=1e-6)
    penalty = stateful(make(name))
    alone, _ = penalty.apply(empty, penalty.init(empty), 0)
    assert alone == 0 and alone.shape == ()


@pytest.mark.parametrize("zeros", [slice(None), slice(1, None), slice(0, 2)])
@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_gradients_are_finite_where_columns_are_zero(name, with_s, zeros):
    """Zero tails, zero heads, and factors that are zero altogether: no NaN, no push."""
    layer = single(arrays(0, with_s))
    layer["u"] = layer["u"].at[:, zeros].set(0)
    layer["v"] = layer["v"].at[zeros].set(0)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: value_of(name, [x])))(layer)
    assert np.isfinite(value)
    for key, part in gradient.items():
        assert np.all(np.isfinite(part)), key
    np.testing.assert_array_equal(gradient["u"][:, zeros], 0)
    np.testing.assert_array_equal(gradient["v"][zeros], 0)


@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_gradients_are_finite_in_corners(name, with_s):
    """Equal singular values, one side zero, scales zero, and tiny or huge factors."""
    eye = single({"u": np.eye(3), "v": np.eye(3), "s": np.ones(3)})
    one_side = single(arrays(0, True)) | {"u": jnp.zeros((4, 3))}
    no_scale = single(arrays(0, True)) | {"s": jnp.zeros(3)}
    tiny = jax.tree.map(lambda x: 1e-12 * x, single(arrays(0, True)))
    huge = jax.tree.map(lambda x: 1e4 * x, single(arrays(0, True)))
    run = jax.jit(jax.value_and_grad(lambda x: value_of(name, [x])))
    for layer in (eye, one_side, no_scale, tiny, huge):
        layer = layer if with_s else {"u": layer["u"], "v": layer["v"]}
        value, gradient = run(layer)
        assert np.isfinite(value)
        for key, part in gradient.items():
            assert np.all(np.isfinite(part)), key


@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_a_nan_is_not_swallowed(name, with_s):
    """A run that has gone wrong must show it in its penalties."""
    layer = single(arrays(0, with_s))
    layer = {key: x.at[(0,) * x.ndim].set(np.nan) for key, x in layer.items()}
    assert np.isnan(value_of(name, [layer]))


MASKS = {"one matrix": ((), 1), "stack": ((2,), [1, 3]), "nothing": ((), 0)}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize(("name", "with_s"), CASES)
def test_the_active_rank_does_not_matter(name, with_s, case):
    """Masked columns are penalized, so that a penalty can shrink them: the value and
    the gradient are over the allocated ones, of a stack with different ranks too."""
    stack, rank = MASKS[case]
    layer = single(arrays(0, with_s, stack))

    def value(layer, rank):
        model = Factors(**layer)
        if rank is not None:
            model.set_rank(rank)
        return evaluate(name, model)

    run = jax.jit(jax.value_and_grad(value))
    whole, masked = run(layer, None), jax.value_and_grad(value)(layer, rank)
    assert whole[0] > 0
    for first, second in zip(*map(jax.tree.leaves, (whole, masked)), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_columns_that_were_cut_do_not_count(name):
    """The penalty of what is left, down to nothing."""
    row, layer = ROWS[name], single(arrays(0, True))
    model = Factors(**layer if row.needs_s else {n: layer[n] for n in "uv"})
    penalty = stateful(make(name, [""]))
    state = penalty.init(model)
    model.cut(1)
    state = carry(penalty, state, model)
    value, _ = penalty.apply(model, state, 0)
    arrays_left = zip("usv", model.arrays(), strict=True)
    left = {n: np.float64(array) for n, array in arrays_left if array is not None}
    expected = reference(row.reference, [left])
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    model.cut(0)
    penalty = stateful(make(name))
    assert penalty.apply(model, carry(penalty, state, model), 0)[0] == 0


def test_a_model_without_factors_costs_nothing(name):
    """The sum over no layers is 0, a scalar."""
    penalty, dense = stateful(make(name)), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    value, _ = penalty.apply(dense, penalty.init(dense), 0)
    assert value == 0 and jnp.shape(value) == ()


def test_a_penalty_takes_any_model_and_finds_its_factors(name):
    """Of a factorized net as of the factors alone; abstract ones too."""
    dense = nnx.Sequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(n)) for n in range(2)])
    net = factorize(dense, [(".*", {"with_s": True})])
    factors = find_factors(net)
    assert list(factors) == ["layers/0", "layers/1"]
    np.testing.assert_allclose(
        evaluate(name, net),
        evaluate(name, nnx.Dict(a=factors["layers/0"]))
        + evaluate(name, nnx.Dict(a=factors["layers/1"])),
        rtol=1e-5,
    )
    penalty = make(name, factors)
    check_stateless(penalty, net)
    check_stateless(penalty, nnx.eval_shape(lambda: net))


def test_negative_weights_are_refused(name):
    """A negative weight would reward large columns."""
    with pytest.raises(UserError, match="weight: must be >= 0, got -1"):
        make(name, weight=-1)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.needs_s])
def test_penalties_of_scales_need_scales(name):
    """All layers without are named, with the rule and the fix."""
    layers = {
        "in": Factors(**single(arrays(0, False))),
        "mid": Factors(**single(arrays(0, True))),
        "out": Factors(**single(arrays(1, False))),
    }
    message = rf'in, out: penalty {name} needs .* Set "with_s": true in rank_rules'
    with pytest.raises(UserError, match=message):
        PENALTIES[name](weight=1)(nnx.Dict(layers))
    with pytest.raises(UserError, match=f"^the model itself: penalty {name} needs"):
        PENALTIES[name](weight=1)(layers["in"])


BAD_ARGUMENTS = [
    ("modified_stable_rank", {"target_ranks": {}, "power": 3}, "power: must be 1 or 2"),
    (
        "modified_stable_rank",
        {"target_ranks": {}, "every_steps": 0},
        "every_steps: .*0",
    ),
    ("stable_rank", {"every_steps": 0}, "every_steps: must be >= 1, got 0"),
    ("funnel", {"start": 0, "end": 1, "anneal_steps": 1}, "start: must be > 0, got 0"),
    ("funnel", {"start": 1, "end": -2, "anneal_steps": 1}, "end: must be > 0, got -2"),
    ("funnel", {"start": 1, "end": 1, "anneal_steps": 0}, "anneal_steps: .*got 0"),
    (
        "log_determinant",
        {"every_steps": 0, "start": 1, "end": 1, "anneal_steps": 1},
        "every_steps: must be >= 1, got 0",
    ),
    (
        "log_determinant",
        {"every_steps": 1, "start": 0, "end": 1, "anneal_steps": 1},
        "start: must be > 0, got 0",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name, arguments, message):
    """In the factory, before any step."""
    with pytest.raises(UserError, match=message):
        PENALTIES[name](weight=1, **arguments)
