"""Rank samplers: one table and a contract for all of them; a new one is a row more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import draws
from flax import nnx
from sampler_rows import BATCH, MAX_RANKS, OF_LAYERS, ROWS, SMALL

from lowrank_jax import factorization, samplers
from lowrank_jax.active import get_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.samplers import SAMPLERS, RankSampler, carry
from lowrank_jax.surgery import truncate


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sampler(name: str) -> RankSampler:
    return ROWS[name]


@functools.cache
def contract_draws(name: str) -> dict[str, np.ndarray]:
    """What the tests of the contract look at: 50 steps of a row."""
    return draws(ROWS[name], MAX_RANKS, 50)


def test_every_sampler_has_a_row():
    """A sampler without a row would be untested."""
    assert {name.split(",")[0] for name in ROWS} == set(SAMPLERS)


def test_ranks_have_the_shape_and_the_bounds_of_their_layer(name, sampler):
    """Leading axis of passes, then the stack, then the batch; int32 in [0, full]."""
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
    """Rank 0 is drawn only where it is the full one, or a profile says so."""
    for path, ranks in contract_draws(name).items():
        source = SMALL if sampler is ROWS["family"] else MAX_RANKS
        least = np.minimum(np.asarray(source[path]), 1)
        least = least[..., None] if sampler.per_example else least
        assert np.all(ranks >= least)


def test_the_full_pass_comes_first_where_it_is_promised(name, sampler):
    """`full_first` says that pass 0 of every step runs at the full ranks."""
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
    def sample(state, key, step):
        traces.append(None)
        return sampler.sample(state, key, step)

    state = sampler.init(MAX_RANKS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    types, before = jax.tree.map(jax.typeof, state), jax.tree.map(np.array, state)
    other, _ = sample(state, jax.random.key(17), jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, before, state)
    steps = []
    keys = jax.random.split(jax.random.key(0), 50)  # a pass has 25 pairs
    for step, key in enumerate(keys):
        ranks, state = sample(state, key, jnp.int32(step))
        assert jax.tree.map(jax.typeof, state) == types
        steps.append(ranks)
    for path, expected in contract_draws(name).items():
        np.testing.assert_array_equal([ranks[path] for ranks in steps], expected)
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
        if name in OF_LAYERS:
            sampler = OF_LAYERS[name](max_ranks, max_ranks)
        ranks, state = sampler.sample(sampler.init(max_ranks), jax.random.key(0), 0)
        assert list(ranks) == list(max_ranks)
        assert not any(np.any(rank) for rank in ranks.values())
        again, _ = sampler.sample(state, jax.random.key(0), 1)
        kept = carry(sampler, state, max_ranks)
        assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, state)
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, ranks)


def small_model() -> nnx.Module:
    model = nnx.Dict(
        linear=nnx.Linear(5, 6, rngs=nnx.Rngs(0)),
        groups=nnx.Conv(4, 4, (2,), feature_group_count=2, rngs=nnx.Rngs(1)),
    )
    return factorization.factorize(model)


def masked_model() -> nnx.Module:
    """Active below allocated; the stack of groups with different ranks."""
    model = small_model()
    set_ranks(model, {"linear": 3, "groups": [2, 1]})
    return model


def cut_model() -> nnx.Module:
    return truncate(small_model(), {"linear": 2, "groups": [1, 2]})


MODELS = {"full": small_model, "masked": masked_model, "cut": cut_model}


def fitted(name: str, model: nnx.Module) -> RankSampler:
    """The row itself, or where it names layers one with ranks of this model."""
    if name not in OF_LAYERS:
        return ROWS[name]
    ranks = get_ranks(model)
    ones = {path: np.ones_like(rank).tolist() for path, rank in ranks.items()}
    return OF_LAYERS[name](ranks, ones)


@pytest.mark.parametrize("kind", MODELS)
def test_ranks_fit_the_model_they_were_made_for(name, kind):
    """`set_ranks` takes each pass's ranks as they are, of stacks and per example too;
    none is above the active rank, which is the full one of a masked model.
    """
    model = MODELS[kind]()
    active = get_ranks(model)
    sampler = fitted(name, model)
    drawn = draws(sampler, model, 20)
    for path, limit in active.items():
        limit = np.asarray(limit)[..., None] if sampler.per_example else limit
        assert np.all(drawn[path] <= limit), path
    first = {path: ranks[0] for path, ranks in drawn.items()}
    for number in range(sampler.passes):
        ranks = first
        if sampler.passes > 1:
            ranks = {path: rank[number] for path, rank in first.items()}
        set_ranks(model, {path: jnp.asarray(rank) for path, rank in ranks.items()})
        for path, factors in find_factors(model).items():
            np.testing.assert_array_equal(factors.rank[...], ranks[path])
            assert factors.per_example == sampler.per_example


def test_a_model_stands_for_its_active_ranks(name):
    """The state is the same from a masked model and from its ranks."""
    model = masked_model()
    sampler = fitted(name, model)
    jax.tree.map(
        np.testing.assert_array_equal,
        sampler.init(model),
        sampler.init(get_ranks(model)),
    )


def test_a_model_with_a_rank_per_example_is_no_start(name):
    """A batch axis is no stack; the layer is named."""
    model, sampler = small_model(), fitted(name, small_model())
    set_ranks(model, {"linear": jnp.array([1, 2, 3])})
    with pytest.raises(UserError, match="linear: .* one rank a matrix"):
        sampler.init(model)


@pytest.mark.parametrize("kind", ["masked", "cut"])
def test_a_state_goes_over_a_cut(name, kind):
    """What `carry` makes samples within the new ranks; full passes are full again.

    The same structure and dtypes as a new state, which is the template for loading.
    """
    before, after = small_model(), MODELS[kind]()
    sampler = fitted(name, before)
    state = sampler.init(before)
    _, state = sampler.sample(state, jax.random.key(1), 0)
    state = carry(sampler, state, after)
    types = [jax.tree.map(jax.typeof, s) for s in (state, sampler.init(after))]
    assert types[0] == types[1]
    drawn = draws(sampler, after, 25, state=state, start=5)
    for path, limit in get_ranks(after).items():
        limit = np.asarray(limit)[..., None] if sampler.per_example else limit
        assert np.all(drawn[path] <= limit) and np.any(drawn[path] > 0), path
        if sampler.full_first:
            full = drawn[path][:, 0] if sampler.passes > 1 else drawn[path]
            np.testing.assert_array_equal(full, np.broadcast_to(limit, full.shape))


def many_layers() -> nnx.Module:
    """Twelve layers of a list, the third of a higher rank than all others."""
    model = factorization.factorize(
        nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(n)) for n in range(12)))
    )
    others = {path: 2 for path in get_ranks(model) if path != "layers/2"}
    return truncate(model, others)


def test_ranks_are_the_same_in_jit_however_many_layers_a_list_has(name):
    """JAX sorts paths as text, "layers/10" before "layers/2": they are numbered so.

    Of 64 jitted draws of `single_layer` most were above their layer's limit else.
    """
    model = many_layers()
    limits, sampler = get_ranks(model), fitted(name, model)
    eager = jitted = sampler.init(model)
    sample = jax.jit(sampler.sample)
    for step in range(4):
        key = jax.random.key(step)
        expected, eager = sampler.sample(eager, key, jnp.int32(step))
        found, jitted = sample(jitted, key, jnp.int32(step))
        for path in limits:
            np.testing.assert_array_equal(found[path], expected[path], path)
        jax.tree.map(np.testing.assert_array_equal, jitted, eager)
    for path, drawn in draws(sampler, model, 64).items():
        assert np.all(drawn <= limits[path]), path


def test_single_layer_goes_on_with_its_pass_over_a_cut():
    """The pairs that are left and not yet taken come, each once, in their old order."""
    sampler = ROWS["single_layer"]
    before, after = {"a": 6, "b": [4, 3]}, {"a": 3, "b": [4, 1]}

    def to_come(state):
        """(layer, rank) in the order of the pass, from the state itself."""
        order = np.asarray(state.order)[int(state.position) :]
        return [(int(state.layers[n]), int(state.ranks[n])) for n in order]

    state = sampler.init(before)
    for step in range(6):
        _, state = sampler.sample(state, jax.random.key(step), step)
    sizes = [3, 4, 1]
    left = [(n, rank) for n, rank in to_come(state) if rank <= sizes[n]]
    state = sampler.keep(state, after)
    assert to_come(state) == left and 0 < len(left) < 8
    for n, rank in left:
        ranks, state = sampler.sample(state, jax.random.key(9), 6)
        flat = [int(ranks["a"]), *ranks["b"].tolist()]
        assert flat == [rank if n == m else size for m, size in enumerate(sizes)]
    assert int(state.position) == 8  # the next pass is shuffled anew, of all pairs
    assert sorted(np.asarray(state.order)) == list(range(8))


@pytest.mark.parametrize("name", ["single_layer", "ladder"])
@pytest.mark.parametrize("after", [{"a": 7}, {"b": 4}, {"a": 4, "b": 2}, {"a": [2, 2]}])
def test_a_state_is_made_anew_where_more_than_ranks_fell(name, after):
    """A raised rank, other layers, another stack."""
    sampler = ROWS[name]
    _, state = sampler.sample(sampler.init({"a": 5}), jax.random.key(0), 0)
    new = sampler.keep(state, after)
    jax.tree.map(np.testing.assert_array_equal, new, sampler.init(after))


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
    "no stratum": (
        functools.partial(samplers.strata, fractions=()),
        "strata: fractions must hold at least one stratum",
    ),
    "an empty stratum": (
        functools.partial(samplers.strata, fractions=((0.5,), ())),
        r"strata: .*got \(\(0.5,\), \(\)\)",
    ),
    "the full model in a stratum": (
        functools.partial(samplers.strata, fractions=((1.0, 0.5),)),
        r"each fractions in \(0, 1\)",
    ),
    "draws between": (
        functools.partial(samplers.strata, fractions=((0.5,),), between="any"),
        "between must be one of",
    ),
    "no profile": (
        functools.partial(samplers.family, profiles=[]),
        "at least one",
    ),
}
REFUSED_PROFILES = {
    "not nested": ([{"a": 2, "b": 2}, {"a": 3, "b": 1}], r"nested.*\['b'\]"),
    "not nested stack": ([{"a": [1, 3], "b": 2}, {"a": [2, 2], "b": 2}], r"nested"),
    "missing": ([{"a": 2}], r"profiles\[0\]: must name all .*none of \['b'\]"),
    "unknown": ([{"a": 2, "b": 1, "c": 1}], r"got \['c'\]. The model has"),
    "negative": ([{"a": 1, "b": -1}], r"b: rank must be in \[0, 4\], got -1"),
    "no number": ([{"a": 1, "b": 1.5}], r"b: rank must be a whole number.*got 1.5"),
    "ragged": ([{"a": [1, [2]], "b": 1}], r"a: rank must be a whole number"),
    "wrong stack": ([{"a": [1, 2, 3], "b": 1}], r"a: rank must be a whole number"),
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
    """Profiles must name all layers by ranks, and be nested."""
    profiles, message = REFUSED_PROFILES[case]
    limits = {"a": [3, 3] if "stack" in case else 3, "b": 4}
    sampler = samplers.family(profiles=profiles)
    for refuse in (sampler.init, sampler.check):
        with pytest.raises(UserError, match=message):
            refuse(limits)


def test_profiles_above_the_ranks_are_refused_by_name_before_the_first_step():
    """`check` is for the model that training starts from; all offenders at once."""
    profiles = [{"a": 3, "b": 4}, {"a": 9, "b": [5, 5]}]
    message = r"family.profiles\[1\]: a: .*\[0, 3\], got 9.*\nb: .*got \[5, 5\]"
    with pytest.raises(UserError, match=message):
        samplers.family(profiles=profiles).check({"a": 3, "b": [4, 4]})
    masked = masked_model()
    family = samplers.family(profiles=[{"linear": 4, "groups": 1}])
    with pytest.raises(UserError, match=r"linear: rank must be in \[0, 3\], got 4"):
        family.check(masked)
    family.check(small_model())


def test_a_family_goes_on_below_its_profiles():
    """Shrunk below a profile, each is lowered to the model's ranks and stays nested.

    On the old tree this died in the middle of a run.
    """
    profiles = [{"a": 6, "b": [4, 4]}, {"a": 4, "b": [4, 2]}, {"a": 1, "b": 1}]
    family = samplers.family(profiles=profiles)
    _, state = family.sample(family.init(profiles[0]), jax.random.key(0), 0)
    tables = carry(family, state, {"a": 3, "b": [4, 3]}).tables
    assert tables["a"].tolist() == [3, 3, 1]
    assert tables["b"].tolist() == [[4, 3], [4, 2], [1, 1]]


def test_a_choice_is_the_ranks_that_are_sampled(name, sampler):
    """`choose` says by number what `sample` says in ranks, from the same key."""
    if sampler.rungs is None:
        assert sampler.choose is None
        return
    rungs, state = sampler.rungs(MAX_RANKS), sampler.init(MAX_RANKS)
    tables = samplers.table_of(rungs).tables
    for key in jax.random.split(jax.random.key(3), 20):
        choices, _ = sampler.choose(state, key, 0)
        ranks, _ = sampler.sample(state, key, 0)
        assert len(choices) == sampler.passes
        for number, choice in enumerate(choices):
            for path, rank in samplers.ranks_of(choice, tables).items():
                expected = ranks[path][number] if sampler.passes > 1 else ranks[path]
                np.testing.assert_array_equal(rank, expected)
