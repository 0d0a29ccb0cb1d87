"""Maestro's rule: the ranks whose tail is too small to keep, and shrinking to them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import relative_error
from two_layers import RANKS, masked_net, net, pure_params

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.shrinking import shrink, tail_ranks
from lowrank_jax.surgery import truncate


def numpy_tail_rank(left: np.ndarray, right: np.ndarray, threshold: float) -> int:
    """Columns `left (i, r)`, `right (o, r)`: the first b whose tail is too small."""
    for first in range(left.shape[1]):
        if (
            np.linalg.norm(left[:, first:]) * np.linalg.norm(right[:, first:])
            < threshold
        ):
            return first
    return left.shape[1]


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_tail_ranks_equal_numpy(with_s, multiple):
    """Maestro's rule, each matrix of a stack by itself, rounded up to a multiple."""
    random, seen = np.random.default_rng(0), set()
    scale = 10.0 ** -np.arange(7)
    for threshold in (1e-9, 1e-5, 1e-3, 1e-1, 1e3):
        u = random.normal(size=(2, 5, 7)) * scale[random.permutation(7)]
        u = u * scale
        v = random.normal(size=(2, 7, 4))
        s = random.normal(size=(2, 7)) if with_s else None
        model = nnx.Dict(
            one=Factors(*(None if x is None else jnp.float32(x) for x in (u, v, s)))
        )
        expected = []
        for n in range(2):
            left = u[n] * (1 if s is None else np.abs(s[n]))
            rank = numpy_tail_rank(left, v[n].T, threshold)
            seen.add(rank)
            expected.append(min(-(-rank // multiple) * multiple, 7))
        found = tail_ranks(model, threshold=threshold, multiple=multiple)
        assert found == {"one": expected}
    assert {0, 7} < seen


def test_tail_ranks_see_active_columns_and_small_ones_inside():
    """Masked columns are not read; a small column before a large one stays."""
    u = jnp.diag(jnp.asarray([1.0, 1e-9, 1.0, 1e-9]))
    model = nnx.Dict(one=Factors(u, jnp.eye(4)))
    assert tail_ranks(model, threshold=1e-5) == {"one": 3}
    for active in (3, 2, 1, 0):
        set_ranks(model, {"one": active})
        expected = min(active, 1 if active < 3 else 3)
        assert tail_ranks(model, threshold=1e-5) == {"one": expected}
        assert tail_ranks(model, threshold=0, multiple=4) == {"one": active}
    none = nnx.Dict(one=Factors(jnp.zeros((4, 0)), jnp.zeros((0, 3))))
    assert tail_ranks(none, threshold=1e-5) == {"one": 0}
    assert tail_ranks(nnx.Dict(one=Factors(0 * u, jnp.eye(4))), threshold=1e-5) == {
        "one": 0
    }


def test_shrinking_by_the_rule_never_raises_a_rank():
    """(bug 1) A masked model and a stack that was cut keep their function."""
    model = masked_net()
    inputs, optimizer = jnp.ones((2, 6)), optax.sgd(0.1)
    for given in (model, truncate(model, {"groups": [1, 2]})):
        ranks = tail_ranks(given, threshold=1e-9, multiple=2)
        assert ranks == get_ranks(given) == RANKS
        state = optimizer.init(pure_params(given))
        small, _, _ = shrink(given, ranks, state, optimizer)
        assert get_ranks(small) == RANKS
        assert relative_error(small(inputs), given(inputs)) <= 1e-6


def test_tail_ranks_refuse_nan_by_name():
    """(bug 21) All layers with one; what is masked is not asked."""
    model = masked_net()
    factors = find_factors(model)
    factors["first"].u.set_value(factors["first"].u[...].at[0, 5].set(jnp.nan))
    assert tail_ranks(model, threshold=1e-9) == RANKS
    for matrix in factors.values():
        matrix.v.set_value(matrix.v[...].at[..., 0, 0].set(jnp.nan))
    with pytest.raises(UserError, match=r"(?s)first: .*NaN.*groups: .*NaN"):
        tail_ranks(model, threshold=1e-9)


def test_tail_ranks_go_into_shrink():
    """Columns that a lasso has driven to zero go, and the function stays."""
    model = nnx.merge(*net(False), copy=True)
    for path, factors in find_factors(model).items():
        tail = max_ranks(truncate(model, RANKS))[path]
        factors.u.set_value(factors.u[...].at[..., np.max(tail) :].set(0))
    ranks = tail_ranks(model, threshold=1e-5)
    assert ranks == {"first": 2, "groups": [2, 2]}
    optimizer = optax.sgd(0.1)
    small, _, _ = shrink(model, ranks, optimizer.init(pure_params(model)), optimizer)
    assert max_ranks(small) == ranks
    inputs = jnp.ones((2, 6))
    assert relative_error(small(inputs), model(inputs)) <= 1e-6
