"""The distribution that each rank sampler draws from, in vectorized draws."""

import collections
import math

import jax
import numpy as np
import pytest
from drawing import chi_square, draws

from lowrank_jax import samplers
from lowrank_jax.ranks import fraction_of

MAX_RANKS = {"a": 5, "b": 0, "c": [3, 4], "d": [[2, 0], [1, 7]]}
"""A layer, one cut to rank 0, a stack, and a stack of grouped convolutions."""
FJORD = (0.2, 0.4, 0.6, 0.8, 1.0)


def pairs_of(ranks, limits):
    """The (path, place in the stack, rank) that is below full or full, each step."""
    flat = {
        (path, place): (draw.reshape(len(draw), -1)[:, place], limit)
        for path, draw in ranks.items()
        for place, limit in enumerate(np.ravel(limits[path]))
    }
    for step in range(len(next(iter(ranks.values())))):
        below = {key: d[step] for key, (d, limit) in flat.items() if d[step] < limit}
        yield below


def test_single_layer_visits_every_pair_once_per_pass():
    """(Maestro) Every (layer, rank) once, all other layers full; then shuffled anew.

    The pair (layer, full rank) shows as no layer below full: there is one for each
    layer.
    """
    total = sum(np.sum(limit) for limit in MAX_RANKS.values())
    ranks = draws(samplers.single_layer(), MAX_RANKS, 3 * total)
    steps = list(pairs_of(ranks, MAX_RANKS))
    assert all(len(below) <= 1 for below in steps)
    expected = collections.Counter(
        (path, place, rank)
        for path, limits in MAX_RANKS.items()
        for place, limit in enumerate(np.ravel(limits))
        for rank in range(1, limit)
    )
    layers = sum(np.count_nonzero(limit) for limit in MAX_RANKS.values())
    passes = [steps[n * total : (n + 1) * total] for n in range(3)]
    for visited in passes:
        seen = collections.Counter((*k, int(r)) for b in visited for k, r in b.items())
        assert seen == expected
        assert sum(not below for below in visited) == layers
    assert passes[0] != passes[1] != passes[2]


def test_single_layer_chooses_a_layer_in_proportion_to_its_rank():
    """P(layer i) = r_i / sum r at the first step of a pass, over many keys."""
    limits = {"a": 2, "b": 3, "c": 15}  # a pair at full rank shows nothing
    sampler, number = samplers.single_layer(), 4000
    keys = jax.random.split(jax.random.key(3), number)
    state = sampler.init(limits)
    ranks = jax.vmap(lambda key: sampler.sample(state, key, 0)[0])(keys)
    for path, limit in limits.items():
        counts = np.bincount(ranks[path], minlength=limit + 1)
        assert counts[0] == 0
        np.testing.assert_allclose(counts[1:limit] / number, 1 / 20, atol=0.016)


@pytest.mark.parametrize(
    "sampler", [samplers.independent(), samplers.per_example(batch_size=6)]
)
def test_independent_ranks_are_uniform_and_independent(sampler):
    """Chi-square on each layer's ranks, and on pairs of layers and of stack entries."""
    limits = {"a": 5, "b": 5, "c": [3, 4]}
    ranks = draws(sampler, limits, 4000)
    if sampler.per_example:  # examples are further draws
        ranks = {
            p: np.moveaxis(r, -1, 1).reshape(-1, *r.shape[1:-1])
            for p, r in ranks.items()
        }
    layers = [(ranks["a"], 5), (ranks["b"], 5)]
    layers += [(ranks["c"][:, 0], 3), (ranks["c"][:, 1], 4)]
    for draw, limit in layers:
        counts = np.bincount(draw, minlength=limit + 1)
        assert counts[0] == 0
        assert chi_square(counts[1:], np.full(limit, 1 / limit)) < 4
    pairs = zip(layers, layers[1:] + layers[:1], strict=True)
    for (first, n), (second, m) in pairs:
        joint = np.bincount((first - 1) * m + second - 1, minlength=n * m)
        assert chi_square(joint, np.full(n * m, 1 / (n * m))) < 3


def test_geometric_ranks_fall_by_the_decay_and_the_tail_is_the_full_rank():
    """P(b) = (1 - decay) decay^(b - 1), and decay^(r - 1) at the last rank."""
    decay, limit = 0.7, 5
    ranks = draws(
        samplers.geometric(decay=0.7), {"a": limit, "b": [limit, 2], "c": limit}, 6000
    )
    chances = np.array([(1 - decay) * decay**b for b in range(limit - 1)] + [decay**4])
    assert math.isclose(chances.sum(), 1)
    for draw in (ranks["a"], ranks["b"][:, 0]):
        assert chi_square(np.bincount(draw, minlength=6)[1:], chances) < 4
    for other, marginal in ((ranks["b"][:, 1], [0.3, 0.7]), (ranks["c"], chances)):
        size = len(marginal)
        joint = (ranks["a"] - 1) * size + other - 1
        counts = np.bincount(joint, minlength=limit * size)
        assert chi_square(counts, np.outer(chances, marginal).ravel()) < 3


def test_one_fraction_serves_all_layers():
    """Rank ceil(p r) with one p, uniform in (0, 1]: a layer of 12 is a third of one of
    4.

    The largest layer tells p to 1 in 1,000, which bounds every other rank.
    """
    limits = {"a": 1000, "b": 12, "c": [4, 1]}
    ranks = draws(samplers.uniform_fraction(), limits, 3000)
    high, low = ranks["a"] / 1000, (ranks["a"] - 1) / 1000
    for draw, limit in (
        (ranks["b"], 12),
        (ranks["c"][:, 0], 4),
        (ranks["c"][:, 1], 1),
    ):
        assert np.all(draw <= np.ceil(high * limit - 1e-6))
        assert np.all(draw >= np.ceil(low * limit - 1e-6))
    assert (
        chi_square(np.bincount(ranks["b"], minlength=13)[1:], np.full(12, 1 / 12)) < 3
    )


def test_levels_are_exact():
    """ceil(p r) without the errors of floats, all levels equally often (FjORD's
    five)."""
    limits = {"a": 25, "b": 7, "c": [10, 3]}
    levels = tuple(n / 25 for n in (7, 14, 25))
    for fractions in (FJORD, levels):
        sampler = samplers.uniform_fraction(fractions=fractions)
        ranks = draws(sampler, limits, 1500)
        rows = np.column_stack([ranks["a"], ranks["b"], ranks["c"]])
        found = collections.Counter(map(tuple, rows.tolist()))
        expected = {
            tuple(fraction_of(p, limit) for limit in (25, 7, 10, 3)) for p in fractions
        }
        assert set(found) == expected
        chances = np.full(len(fractions), 1 / len(fractions))
        assert chi_square(np.array(list(found.values())), chances) < 4
    assert (7, 2, 3, 1) in found  # 7 / 25 * 25 is 7.000000000000001 in floats


def test_sandwich_is_full_then_smallest_then_random():
    """Pass 0 full, pass 1 ceil(smallest r), the others one fraction each in between."""
    limits = {"a": 1000, "b": [16, 3]}
    ranks = draws(samplers.sandwich(passes=4, smallest=0.25), limits, 500)
    np.testing.assert_array_equal(np.unique(ranks["a"][:, 0]), 1000)
    np.testing.assert_array_equal(np.unique(ranks["a"][:, 1]), 250)
    np.testing.assert_array_equal(np.unique(ranks["b"][:, 1], axis=0), [[4, 1]])
    middle, other = ranks["a"][:, 2:], ranks["b"][:, 2:]
    assert middle.min() >= 250 and middle.max() <= 1000
    assert not np.array_equal(middle[:, 0], middle[:, 1])
    counts = np.histogram(middle, bins=6, range=(250, 1000))[0]
    assert chi_square(counts, np.full(6, 1 / 6)) < 4
    assert np.all(np.abs(other[..., 0] - np.ceil(middle / 1000 * 16)) <= 1)


def test_matryoshka_makes_every_level_each_step():
    """From the full one down, whatever the order they are given in."""
    sampler = samplers.matryoshka(fractions=(0.25, 1.0, 0.5))
    ranks = draws(sampler, {"a": 10, "b": [4, 1]}, 3)
    for step in range(3):
        assert ranks["a"][step].tolist() == [10, 5, 3]
        assert ranks["b"][step].tolist() == [[4, 1], [2, 1], [1, 1]]


def test_strata_give_a_size_each():
    """Pass 0 full, then one rung of each stratum; one that comes twice, twice as
    often."""
    sampler = samplers.strata(fractions=((0.75, 0.5, 0.5), (0.25, 0.125)))
    ranks = draws(sampler, {"a": 16, "b": [8, 1]}, 900)
    assert np.all(ranks["a"][:, 0] == 16)
    for number, (rungs, chances) in enumerate(
        [((12, 8), (1 / 3, 2 / 3)), ((4, 2), (1 / 2, 1 / 2))], start=1
    ):
        found = ranks["a"][:, number]
        counts = np.bincount(found, minlength=17)[list(rungs)]
        assert counts.sum() == 900 and chi_square(counts, np.array(chances)) < 4
        np.testing.assert_array_equal(ranks["b"][:, number, 0], -(-found // 2))
    assert np.all(ranks["b"][..., 1] == 1)
    first, second = ranks["a"][:, 1] == 12, ranks["a"][:, 2] == 4  # independent
    assert 0.1 < np.mean(first & second) < 0.24


@pytest.mark.parametrize("between", ["common", "layers"])
def test_strata_reach_every_rank_between_their_rungs(between):
    """From the next lower rung to the one drawn; the lowest rung as it is."""
    sampler = samplers.strata(fractions=((0.75, 0.5), (0.25,)), between=between)
    ranks = draws(sampler, {"a": 16, "b": [16, 2]}, 1600)
    assert np.all(ranks["a"][:, 0] == 16) and np.all(ranks["a"][:, 2] == 4)
    drawn, other = ranks["a"][:, 1], ranks["b"][:, 1]
    counts = np.bincount(drawn, minlength=17)[4:13]
    chances = np.array([1, 1, 1, 1, 2, 1, 1, 1, 1]) / 10  # 8 is in both intervals
    assert counts.sum() == 1600 and chi_square(counts, chances) < 3.5
    if between == "common":
        np.testing.assert_array_equal(drawn, other[:, 0])
    else:  # each in its own place, of the same rung
        assert np.mean(drawn == other[:, 0]) < 0.4
        assert not np.any((drawn > 8) & (other[:, 0] < 8))
    assert set(other[drawn > 8, 1]) == {1, 2} and set(other[drawn < 8, 1]) == {1}


def test_family_draws_whole_profiles_equally_often():
    """No mixture of two, however they are ordered."""
    profiles = [{"a": n, "b": [n, 2 * n]} for n in (3, 1, 4)]
    ranks = draws(samplers.family(profiles=profiles), {"a": 5, "b": [4, 8]}, 900)
    np.testing.assert_array_equal(ranks["b"][:, 0], ranks["a"])
    np.testing.assert_array_equal(ranks["b"][:, 1], 2 * ranks["a"])
    counts = np.bincount(ranks["a"], minlength=5)[[1, 3, 4]]
    assert counts.sum() == 900 and chi_square(counts, np.full(3, 1 / 3)) < 4


def test_a_family_may_be_given_by_numbers_for_whole_stacks():
    """A profile names a stack by one number, which stands for all of its layers."""
    ranks = draws(samplers.family(profiles=[{"a": 2}]), {"a": [3, 4]}, 2)
    np.testing.assert_array_equal(ranks["a"], [[2, 2], [2, 2]])


def test_examples_may_share_a_fraction_over_the_layers():
    """One p for each example: two layers of equal rank are equal, examples differ."""
    sampler = samplers.per_example(batch_size=300, common_fraction=True)
    ranks = draws(sampler, {"a": 7, "b": [7, 14]}, 2)
    np.testing.assert_array_equal(ranks["a"], ranks["b"][:, 0])
    np.testing.assert_array_equal(ranks["a"], -(-ranks["b"][:, 1] // 2))
    assert chi_square(np.bincount(ranks["a"].ravel())[1:], np.full(7, 1 / 7)) < 3.5
    assert not np.array_equal(ranks["a"][0], ranks["a"][1])
