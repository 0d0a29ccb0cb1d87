"""Penalties: one table with each one's formula in float64 NumPy.

A new penalty is one more row. Values, gradients, stacks and the allocated columns are
checked for all.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax import regularizers, surgery
from lowrank_jax.factors import Factors
from lowrank_jax.regularizers import PENALTIES, Penalty

WEIGHT = 0.3


def numpy_hierarchical(left: np.ndarray, right: np.ndarray) -> float:
    """The double sum of eq. 7 as it stands: columns `left (i, r)` and `right (o,
    r)`."""
    return sum(
        np.linalg.norm(side[:, first:])
        for side in (left, right)
        for first in range(side.shape[1])
    )


def numpy_group(left: np.ndarray, right: np.ndarray) -> float:
    return sum(np.linalg.norm(column) for side in (left, right) for column in side.T)


@dataclasses.dataclass(frozen=True)
class Row:
    """A penalty and the direct formula of one matrix."""

    penalty: Penalty
    reference: Callable[[np.ndarray, np.ndarray], float]


ROWS = {
    "hierarchical_group_lasso": Row(
        regularizers.hierarchical_group_lasso(weight=WEIGHT), numpy_hierarchical
    ),
    "group_lasso": Row(regularizers.group_lasso(weight=WEIGHT), numpy_group),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def arrays(
    seed: int, with_s: bool, stack: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"u": (*stack, 4, 3), "v": (*stack, 3, 2)}
    if with_s:
        shapes["s"] = (*stack, 3)
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def sides(parts: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns of `u diag(|s|)` and of `v` transposed, for each matrix of a stack."""
    scale = np.abs(parts.get("s", np.ones(parts["u"].shape[-1:])))[..., None, :]
    left, right = parts["u"] * scale, np.swapaxes(parts["v"], -1, -2)
    left, right = (x.reshape(-1, *x.shape[-2:]) for x in (left, right))
    return list(zip(left, right, strict=True))


def reference(row: Row, layers: list[dict[str, np.ndarray]]) -> float:
    return WEIGHT * sum(
        row.reference(*pair) for parts in layers for pair in sides(parts)
    )


def penalty(row: Row, layers, step: int = 0):
    factors = {str(n): Factors(**parts) for n, parts in enumerate(layers)}
    return row.penalty(factors, step)


def test_every_penalty_has_a_row():
    """A penalty without a row would be untested."""
    assert set(ROWS) == set(PENALTIES)


@pytest.mark.parametrize("with_s", [False, True])
def test_value_and_gradient_equal_the_formula(row, with_s):
    """In float64, the gradient by central differences; stacks are sums over
    matrices."""
    layers = [arrays(0, with_s), arrays(1, with_s, (2,)), arrays(2, not with_s, (2, 1))]
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, layers)
        evaluate = jax.jit(jax.value_and_grad(lambda layers: penalty(row, layers)))
        value, gradient = evaluate(inputs)
        assert value.dtype == jnp.float64 and value.shape == ()
        np.testing.assert_allclose(value, reference(row, layers), rtol=1e-12)
        for layer, found in zip(layers, gradient, strict=True):
            for name, array in layer.items():
                expected = np.zeros_like(array)
                for index in np.ndindex(array.shape):
                    keep, ends = array[index], []
                    for nudge in (1e-5, -1e-5):
                        array[index] = keep + nudge
                        ends.append(reference(row, layers))
                    array[index] = keep
                    expected[index] = (ends[0] - ends[1]) / 2e-5
                assert relative_error(found[name], expected) <= 1e-8, name


@pytest.mark.parametrize("zeros", [slice(None), slice(1, None), slice(0, 2)])
@pytest.mark.parametrize("with_s", [False, True])
def test_gradients_are_finite_where_columns_are_zero(row, zeros, with_s):
    """Zero tails, zero heads, and factors that are zero altogether: no NaN, no push."""
    layer = jax.tree.map(jnp.float32, arrays(0, with_s))
    layer["u"] = layer["u"].at[:, zeros].set(0)
    layer["v"] = layer["v"].at[zeros].set(0)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: penalty(row, [x])))(layer)
    assert np.isfinite(value)
    for name, part in gradient.items():
        assert np.all(np.isfinite(part)), name
    np.testing.assert_array_equal(gradient["u"][:, zeros], 0)
    np.testing.assert_array_equal(gradient["v"][zeros], 0)


def test_all_allocated_columns_count_and_no_others(row):
    """Masked columns are penalized, so that the lasso can shrink them; cut ones are
    not."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = surgery.factorize(model)
    whole = row.penalty(surgery.find_factors(model), 0)
    surgery.set_ranks(model, {"": 1})
    assert row.penalty(surgery.find_factors(model), 0) == whole > 0
    small = surgery.truncate(model, {"": 1})
    factors = surgery.find_factors(small)
    expected = WEIGHT * row.reference(*sides(values(factors[""]))[0])
    np.testing.assert_allclose(row.penalty(factors, 0), expected, rtol=1e-6)
    none = surgery.find_factors(surgery.truncate(model, {"": 0}))
    assert row.penalty(none, 0) == 0


def values(factors: Factors) -> dict[str, np.ndarray]:
    return {"u": np.float64(factors.u[...]), "v": np.float64(factors.v[...])}


def test_a_model_without_factors_costs_nothing(row):
    """The sum over no layers is 0, a scalar."""
    assert row.penalty({}, 0) == 0 and jnp.shape(row.penalty({}, 0)) == ()


def test_the_lasso_pushes_later_columns_harder():
    """Column b is in b groups: of equal columns the last has the largest gradient.

    Which a plain group lasso does not do.
    """
    layer = {"u": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
    for name, ordered in (("hierarchical_group_lasso", True), ("group_lasso", False)):
        push = jax.grad(lambda x, row=ROWS[name]: penalty(row, [x]))(layer)["u"][0]
        assert np.all(np.diff(push) > 0.01) if ordered else np.ptp(push) < 1e-6


@pytest.mark.parametrize("name", PENALTIES)
def test_negative_weights_are_refused(name):
    """A negative weight would reward large columns."""
    with pytest.raises(ValueError, match="weight: must be >= 0, got -1"):
        PENALTIES[name](weight=-1)
