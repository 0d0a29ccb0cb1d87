"""Rank samplers: one table, a contract for all of them, and each one's distribution.

A new sampler is one more row. Draws of a distribution are made in one vectorized call.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import factorization, samplers
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import fraction_of
from lowrank_jax.samplers import SAMPLERS, RankSampler

MAX_RANKS = {"a": 5, "b": 0, "c": [3, 4], "d": [[2, 0], [1, 7]]}
"""A layer, one cut to rank 0, a stack, and a stack of grouped convolutions."""
SMALL = {"a": 1, "b": 0, "c": [1, 4], "d": [[0, 0], [1, 2]]}
PROFILES = (MAX_RANKS, SMALL)
FJORD = (0.2, 0.4, 0.6, 0.8, 1.0)

ROWS: dict[str, RankSampler] = {
    "full": samplers.full(),
    "single_layer": samplers.single_layer(),
    "independent": samplers.independent(),
    "geometric": samplers.geometric(decay=0.7),
    "uniform_fraction": samplers.uniform_fraction(),
    "uniform_fraction, levels": samplers.uniform_fraction(fractions=FJORD),
    "sandwich": samplers.sandwich(),
    "sandwich, two": samplers.sandwich(passes=2, smallest=0.5),
    "matryoshka": samplers.matryoshka(fractions=(1.0, 0.25, 0.5)),
    "family": samplers.family(profiles=PROFILES),
    "per_example": samplers.per_example(batch_size=6),
    "per_example, common": samplers.per_example(batch_size=6, common_fraction=True),
}
BATCH = 6


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sampler(name: str) -> RankSampler:
    return ROWS[name]


def draws(sampler: RankSampler, max_ranks, number: int, seed: int = 0):
    """Ranks of many steps, `{path: (number, ...)}`, carrying the state as a run
    does."""

    def step(state, key):
        ranks, state = sampler.sample(state, key)
        return state, ranks

    keys = jax.random.split(jax.random.key(seed), number)
    _, ranks = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        sampler.init(max_ranks), keys
    )
    return {path: np.asarray(rank) for path, rank in ranks.items()}


@functools.cache
def contract_draws(name: str) -> dict[str, np.ndarray]:
    """What the tests of the contract look at: 50 steps of a row."""
    return draws(ROWS[name], MAX_RANKS, 50)


def test_every_sampler_has_a_row():
    """A sampler without a row would be untested."""
    assert {name.split(",")[0] for name in ROWS} == set(SAMPLERS)


def test_ranks_have_the_shape_and_the_bounds_of_their_layer(name, sampler):
    """Leading axis of passes, then the stack, then the batch; int32 within [0, max]."""
    ranks = contract_draws(name)
    assert list(ranks) == list(MAX_RANKS)
    for path, limit in MAX_RANKS.items():
        limit = np.asarray(limit)
        lead = (sampler.passes,) if sampler.passes > 1 else ()
        tail = (BATCH,) if sampler.per_example else ()
        assert ranks[path].shape == (50, *lead, *limit.shape, *tail)
        assert ranks[path].dtype == np.int32
        limit = limit[..., None] if sampler.per_example else limit
        assert np.all(ranks[path] >= 0) and np.all(ranks[path] <= limit)
        if path != "b" and sampler is not ROWS["full"]:
            assert len(np.unique(ranks[path])) > 1, path


def test_a_layer_keeps_at_least_one_column_but_where_it_has_none(name, sampler):
    """Rank 0 is drawn only where it is the allocated one, or a profile says so."""
    for path, ranks in contract_draws(name).items():
        source = SMALL if sampler is ROWS["family"] else MAX_RANKS
        least = np.minimum(np.asarray(source[path]), 1)
        least = least[..., None] if sampler.per_example else least
        assert np.all(ranks >= least)


def test_the_full_pass_comes_first_where_it_is_promised(name, sampler):
    """`full_first` says that pass 0 of every step runs at the allocated ranks."""
    for path, ranks in contract_draws(name).items():
        if sampler.full_first:
            first = ranks[:, 0] if sampler.passes > 1 else ranks
            np.testing.assert_array_equal(
                first, np.broadcast_to(np.asarray(MAX_RANKS[path]), first.shape)
            )


def test_sampling_is_pure_compiles_once_and_its_state_is_arrays(name, sampler):
    """The same state and key give the same ranks, as in the scan of `draws`.

    The state goes out as it came in: shapes, dtypes and structure; it is not changed.
    """
    traces = []

    @jax.jit
    def sample(state, key):
        traces.append(None)
        return sampler.sample(state, key)

    state = sampler.init(MAX_RANKS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    types, before = jax.tree.map(jax.typeof, state), jax.tree.map(np.array, state)
    other, _ = sample(state, jax.random.key(17))
    jax.tree.map(np.testing.assert_array_equal, before, state)
    steps = []
    for key in jax.random.split(jax.random.key(0), 50):  # a pass has 25 pairs
        ranks, state = sample(state, key)
        assert jax.tree.map(jax.typeof, state) == types
        steps.append(ranks)
    for path, expected in contract_draws(name).items():
        np.testing.assert_array_equal([step[path] for step in steps], expected)
    assert len(traces) == 1
    if name.split(",")[0] in (
        "independent",
        "geometric",
        "per_example",
        "single_layer",
    ):
        assert any(np.any(other[path] != steps[0][path]) for path in other)


def test_nothing_to_sample_is_no_error(name):
    """A model without low-rank layers, or one that has been cut to nothing."""
    for max_ranks in ({}, {"a": 0}):
        sampler = ROWS[name]
        if name == "family":
            sampler = samplers.family(profiles=[max_ranks])
        ranks, state = sampler.sample(sampler.init(max_ranks), jax.random.key(0))
        assert list(ranks) == list(max_ranks)
        assert not any(np.any(rank) for rank in ranks.values())
        again, _ = sampler.sample(state, jax.random.key(0))
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, ranks)


@functools.cache
def small_model() -> nnx.Module:
    model = nnx.Dict(
        one=nnx.Linear(5, 6, rngs=nnx.Rngs(0)),
        groups=nnx.Conv(4, 4, (2,), feature_group_count=2, rngs=nnx.Rngs(1)),
    )
    return factorization.factorize(model)


def test_ranks_fit_the_model_they_were_made_for(sampler):
    """`set_ranks` takes each pass's ranks as they are, of stacks and per example
    too."""
    model = small_model()
    limits = max_ranks(model)
    if sampler is ROWS["family"]:
        sampler = samplers.family(profiles=[limits])
    ranks = {path: rank[0] for path, rank in draws(sampler, limits, 1).items()}
    for number in range(sampler.passes):
        one = {p: r[number] for p, r in ranks.items()} if sampler.passes > 1 else ranks
        one = {path: jnp.asarray(rank) for path, rank in one.items()}
        set_ranks(model, one)
        for path, factors in find_factors(model).items():
            np.testing.assert_array_equal(factors.rank[...], one[path])
            assert factors.per_example == sampler.per_example


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
    ranks = draws(ROWS["single_layer"], MAX_RANKS, 3 * total)
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
    sampler, number = ROWS["single_layer"], 4000
    keys = jax.random.split(jax.random.key(3), number)
    state = sampler.init(limits)
    ranks = jax.vmap(lambda key: sampler.sample(state, key)[0])(keys)
    for path, limit in limits.items():
        counts = np.bincount(ranks[path], minlength=limit + 1)
        assert counts[0] == 0
        np.testing.assert_allclose(counts[1:limit] / number, 1 / 20, atol=0.016)


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom: near 1 if the chances are
    right."""
    expected = counts.sum() * chances
    return float(np.sum((counts - expected) ** 2 / expected) / (len(counts) - 1))


@pytest.mark.parametrize("name", ["independent", "per_example"])
def test_independent_ranks_are_uniform_and_independent(name):
    """Chi-square on each layer's ranks, and on pairs of layers and of stack entries."""
    limits = {"a": 5, "b": 5, "c": [3, 4]}
    ranks = draws(ROWS[name], limits, 4000)
    if name == "per_example":  # examples are further draws
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
    for (one, n), (other, m) in zip(layers, layers[1:] + layers[:1], strict=True):
        joint = np.bincount((one - 1) * m + other - 1, minlength=n * m)
        assert chi_square(joint, np.full(n * m, 1 / (n * m))) < 3


def test_geometric_ranks_fall_by_the_decay_and_the_tail_is_the_full_rank():
    """P(b) = (1 - decay) decay^(b - 1), and decay^(r - 1) at the last rank."""
    decay, limit = 0.7, 5
    ranks = draws(ROWS["geometric"], {"a": limit, "b": [limit, 2], "c": limit}, 6000)
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
    ranks = draws(ROWS["uniform_fraction"], limits, 3000)
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


REFUSED = {
    "decay 0": (functools.partial(samplers.geometric, decay=0), "decay"),
    "decay 1": (functools.partial(samplers.geometric, decay=1.0), "decay"),
    "one pass": (functools.partial(samplers.sandwich, passes=1), "passes"),
    "smallest": (
        functools.partial(samplers.sandwich, smallest=0.0),
        r"fraction: must be in \(0, 1\]",
    ),
    "no full level": (
        functools.partial(samplers.matryoshka, fractions=(0.5, 0.25)),
        "matryoshka: fractions must hold 1",
    ),
    "one level": (
        functools.partial(samplers.matryoshka, fractions=(1.0,)),
        "a smaller one",
    ),
    "no profile": (
        functools.partial(samplers.family, profiles=[]),
        "at least one",
    ),
}
REFUSED_PROFILES = {
    "not nested": ([{"a": 2, "b": 2}, {"a": 3, "b": 1}], r"nested.*\['b'\]"),
    "not nested stack": ([{"a": [1, 3], "b": 2}, {"a": [2, 2], "b": 2}], r"nested"),
    "missing": ([{"a": 2}], r"must name the layers \['a', 'b'\], got \['a'\]"),
    "unknown": ([{"a": 2, "b": 1, "c": 1}], r"got \['a', 'b', 'c'\]"),
    "above": ([{"a": 9, "b": 1}], r"a: rank must be in \[0, .*got 9"),
    "negative": ([{"a": 1, "b": -1}], r"b: rank must be in \[0, 4\], got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_when_the_sampler_is_made(case):
    """Before any step, with the argument and its range."""
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("fractions", [(0.0, 1.0), (0.5, 1.5), (-0.1,)])
def test_levels_out_of_range_are_refused(fractions):
    """A fraction is in (0, 1]; at the latest before the first step."""
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        samplers.uniform_fraction(fractions=fractions).init({"a": 4})


@pytest.mark.parametrize("case", REFUSED_PROFILES)
def test_wrong_families_are_refused_before_the_first_step(case):
    """Profiles must name all layers, lie within the allocated ranks, and be nested."""
    profiles, message = REFUSED_PROFILES[case]
    limits = {"a": [3, 3] if "stack" in case else 3, "b": 4}
    with pytest.raises(ValueError, match=message):
        samplers.family(profiles=profiles).init(limits)
