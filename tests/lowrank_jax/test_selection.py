"""Rank selection: curves from factors, and solvers from curves and a budget to
ranks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.ranks import at_fraction, at_most
from lowrank_jax.selection import curves, solvers, spectral

SPECTRUM = np.array([4.0, 3.0, 2.0, 1.0])
RANDOM = np.random.default_rng(0)
STACK = np.abs(RANDOM.normal(size=(2, 3, 6)))
LIMITS = {"a": 25, "b": [10, 3], "c": 0, "d": [[1, 7]]}


@pytest.mark.parametrize(
    ("removed", "rank"), [(0.5, 1), (0.3, 2), (0.1, 3), (0.05, 3), (0.01, 4)]
)
def test_energy_rule_has_the_golden_values(removed, rank):
    """methods.md 0.2: the share of s^2 that may go, of the spectrum 4, 3, 2, 1."""
    assert spectral.by_energy({"a": SPECTRUM}, 1 - removed) == {"a": rank}


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_energy_rule_is_the_least_prefix(energy):
    """One column fewer would miss the share, in each matrix of a stack by itself."""
    ranks = np.asarray(spectral.by_energy({"a": STACK}, energy)["a"])
    assert ranks.shape == (2, 3)
    for index in np.ndindex(2, 3):
        squares = STACK[index] ** 2
        needed = energy * squares.sum() * (1 - 1e-9)
        rank = ranks[index]
        assert squares[:rank].sum() >= needed > squares[: rank - 1].sum()


def test_energy_rule_meets_shares_exactly():
    """A share that is met exactly is met, floats or not; all of it is all that is
    there."""
    equal = {"a": np.ones(10), "b": np.sqrt(np.full(7, 0.1))}
    for kept in range(1, 8):
        assert spectral.by_energy({"b": equal["b"]}, kept / 7) == {"b": kept}
    assert spectral.by_energy(equal, 0.3) == {"a": 3, "b": 3}
    many = {"a": np.ones(25)}  # 0.28 * 25 is 7.000000000000001 in floats
    assert spectral.by_energy(many, 0.28) == {"a": 7}
    assert spectral.by_energy(equal, 1.0) == {"a": 10, "b": 7}
    assert spectral.by_energy({"a": np.array([2.0, 1.0, 0.0, 0.0])}, 1.0) == {"a": 2}
    small = {"a": np.array([1.0, 1e-7, 1e-30, 0.0])}
    assert spectral.by_energy(small, 1.0) == {"a": 3}
    tail = {"a": np.array([1.0, 1e-20])}
    assert spectral.by_energy(tail, 0.5) == {"a": 1}


def test_energy_rule_knows_columns_of_nothing():
    """Zero columns, no columns, no layers."""
    found = spectral.by_energy({"a": np.zeros(3), "b": np.zeros(0)}, 0.9)
    assert found == {"a": 0, "b": 0}
    assert spectral.by_energy({"a": np.array([[0.0, 0.0], [1.0, 0.0]])}, 0.9) == {
        "a": [0, 1]
    }
    assert spectral.by_energy({}, 0.9) == {}


def test_energy_rule_is_monotone():
    """More energy never means a lower rank."""
    found = [
        spectral.by_energy({"a": STACK}, energy)["a"]
        for energy in np.linspace(0.01, 1, 60)
    ]
    assert np.all(np.diff(np.asarray(found), axis=0) >= 0)


@pytest.mark.parametrize("with_s", [False, True])
def test_importances_are_norms_of_rank_one_parts(with_s):
    """||u_b|| |s_b| ||v_b||, which is ||u_b s_b v_b||_F."""
    u, v = RANDOM.normal(size=(2, 5, 3)), RANDOM.normal(size=(2, 3, 4))
    s = RANDOM.normal(size=(2, 3)) if with_s else None
    factors = Factors(*(None if x is None else jnp.float32(x) for x in (u, v, s)))
    found = curves.column_importances({"a": factors})["a"]
    parts = u.swapaxes(-1, -2)[..., :, None] * v[..., None, :]
    expected = np.linalg.norm(parts, axis=(-2, -1))
    expected = expected if s is None else expected * np.abs(s)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float64
    diagonal = Factors(jnp.diag(jnp.sqrt(jnp.arange(4.0, 0, -1))), jnp.eye(4))
    assert spectral.by_energy(curves.column_importances({"": diagonal}), 0.7) == {"": 2}


def masked_factors() -> dict[str, Factors]:
    """Active below allocated: rank 2 and 3 of 6, 0 of 6, and a ragged stack; with
    scales, and with square factors on either side."""

    def draw(*shape: int) -> Any:
        return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)

    factors = {
        "two": Factors(draw(8, 6), draw(6, 7)),
        "three": Factors(draw(8, 6), draw(6, 7), draw(6)),
        "none": Factors(draw(8, 6), draw(6, 7)),
        "stack": Factors(draw(3, 8, 6), draw(3, 6, 7)),
        "deep": Factors(draw(6, 6), draw(6, 9), middle=draw(2, 6, 6)),
        "deep wide": Factors(draw(9, 6), draw(6, 6), middle=draw(2, 6, 6)),
    }
    for path, rank in MASKED.items():
        factors[path].set_rank(rank)
    return factors


MASKED = {
    "two": 2,
    "three": 3,
    "none": 0,
    "stack": [1, 2, 5],
    "deep": 4,
    "deep wide": 2,
}


def test_masked_columns_have_no_importance():
    """Importances are those of the model that was cut at the active rank; all of the
    energy is the active rank, and less is never more."""
    factors = masked_factors()
    found = curves.column_importances(factors)
    for path, rank in MASKED.items():
        cut = {path: factors[path]}
        cut[path].cut(rank)
        expected = curves.column_importances(cut)[path]
        width = expected.shape[-1]
        np.testing.assert_allclose(found[path][..., :width], expected, rtol=1e-5)
        past = np.arange(found[path].shape[-1]) >= np.asarray(rank)[..., None]
        np.testing.assert_array_equal(found[path] == 0, past)
    assert spectral.by_energy(found, 1.0) == MASKED
    for energy in (0.5, 0.99):
        ranks = spectral.by_energy(found, energy)
        assert all(np.all(np.less_equal(ranks[p], MASKED[p])) for p in MASKED)


def test_importances_of_tiny_columns_are_not_zero():
    """1e-30 squared is 0 in float32; the column is there."""
    factors = Factors(jnp.diag(jnp.array([1.0, 1e-30, 0.0])), jnp.eye(3))
    found = curves.column_importances({"a": factors})
    np.testing.assert_allclose(found["a"], [1, 1e-30, 0], rtol=1e-6)
    assert spectral.by_energy(found, 1.0) == {"a": 2}
    assert spectral.by_energy(found, 1 - 1e-9) == {"a": 1}


def test_importances_need_one_rank_for_all_examples():
    """There is no common mask with one rank per example."""
    factors = Factors(jnp.eye(3), jnp.eye(3))
    factors.set_rank(jnp.array([1, 2]))
    with pytest.raises(UserError, match="enc/up: rank must be one number"):
        curves.column_importances({"enc/up": factors})


def test_at_most_and_at_fraction():
    """Plain numbers in the shape of the limits; fractions are rounded up, exactly."""
    assert at_most(LIMITS, 5) == {"a": 5, "b": [5, 3], "c": 0, "d": [[1, 5]]}
    assert at_most(LIMITS, 0) == {"a": 0, "b": [0, 0], "c": 0, "d": [[0, 0]]}
    assert at_fraction(LIMITS, 1.0) == LIMITS
    found = at_fraction(LIMITS, 7 / 25)
    assert found == {"a": 7, "b": [3, 1], "c": 0, "d": [[1, 2]]}
    assert all(type(x) is int for x in (found["a"], *found["b"]))


COSTS = {
    "a": LayerCost(12, 20, 1, 1, 1, 1),
    "b": LayerCost(8, 8, 2, 9, 9, 9),
    "c": LayerCost(3, 50, 1, 1, 1, 1),
}
COST_LIMITS = {"a": 12, "b": [8, 5], "c": 3}
DENSE = 12 * 20 + 2 * 8 * 8 + 3 * 50


def params(ranks) -> int:
    """Counted here, in the smaller of the two forms of each matrix."""
    pairs = [(12, 20, ranks["a"]), (3, 50, ranks["c"])]
    pairs += [(8, 8, rank) for rank in ranks["b"]]
    return sum(min(i * o, rank * (i + o)) for i, o, rank in pairs)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.5, 0.62, 0.8, 0.9, 0.999, 1.0])
def test_params_fraction_is_within_the_budget_and_maximal(share):
    """Brute force over all common fractions finds no larger one that fits."""
    found = solvers.by_params_fraction(COSTS, COST_LIMITS, share)
    assert params(found) <= share * DENSE
    profiles = [at_fraction(COST_LIMITS, n / 480) for n in range(1, 481)]
    fits = [profile for profile in profiles if params(profile) <= share * DENSE]
    assert found == max(fits, key=lambda p: (p["a"], *p["b"], p["c"]))


def test_params_fraction_is_monotone_and_full_at_one():
    """A larger budget never means a lower rank; the dense size allows full rank."""
    found = [
        solvers.by_params_fraction(COSTS, COST_LIMITS, share)
        for share in np.linspace(0.3, 1, 30)
    ]
    for small, large in zip(found, found[1:], strict=False):
        assert all(np.all(np.less_equal(small[p], large[p])) for p in COSTS)
    assert found[-1] == COST_LIMITS
    assert found[0] != found[-1]


def test_params_fraction_needs_room_for_rank_one():
    """The error says what the least share is, and that share is indeed accepted."""
    with pytest.raises(ValueError, match=r"must be at least (\S+) here") as error:
        solvers.by_params_fraction(COSTS, COST_LIMITS, 0.1)
    least = (32 + 2 * 16 + 53) / DENSE
    assert f"{least:.4g}" in str(error.value) and "got 0.1" in str(error.value)
    found = solvers.by_params_fraction(COSTS, COST_LIMITS, least)
    assert found == {"a": 1, "b": [1, 1], "c": 1}


def test_params_fraction_of_nothing_is_nothing():
    """A model without low-rank layers, or cut to rank 0."""
    assert solvers.by_params_fraction({}, {}, 0.5) == {}
    assert solvers.by_params_fraction({"c": COSTS["c"]}, {"c": 0}, 0.01) == {"c": 0}


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_shares_out_of_range_are_refused(share):
    """Every share is in (0, 1]."""
    with pytest.raises(ValueError, match=r"energy: must be in \(0, 1\]"):
        spectral.by_energy({"a": SPECTRUM}, share)
    with pytest.raises(ValueError, match=r"params_fraction: must be in \(0, 1\]"):
        solvers.by_params_fraction(COSTS, COST_LIMITS, share)
    with pytest.raises(ValueError, match=r"fraction: must be in \(0, 1\]"):
        at_fraction(LIMITS, share)


def test_negative_ranks_are_refused():
    """A rank is at least 0."""
    with pytest.raises(ValueError, match="rank: must be at least 0, got -1"):
        at_most(LIMITS, -1)
