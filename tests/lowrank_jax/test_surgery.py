"""Surgery on whole models: one table of models, one test for each promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import relative_error, spectrum_error
from surgery_models import (
    ROWS,
    assert_same,
    dense_of,
    dense_outputs,
    factored_of,
    lower,
    outputs_of,
    shapes,
    spoil,
    values,
)

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LAYERS
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import flatten_rank
from lowrank_jax.surgery import canonicalize, merge, truncate


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_factorize_finds_every_layer_and_leaves_nothing_dense(name):
    """The paths and ranks are the table's, and no dense twin is left anywhere."""
    model = factored_of(name)
    assert max_ranks(model) == get_ranks(model) == ROWS[name].ranks
    left = [path for path, node in nnx.iter_graph(model) if type(node) in LAYERS]
    assert not left
    assert all(isinstance(one, Factors) for one in find_factors(model).values())


@pytest.mark.parametrize("with_s", [False, True])
def test_full_rank_equals_dense(name, with_s):
    """(1) In function, and `merge` gives the same kind of model back."""
    model, dense = factored_of(name, with_s), dense_of(name)
    assert relative_error(outputs_of(model, name), dense_outputs(name)) <= 1e-5
    back = merge(model)
    assert nnx.graphdef(back) == nnx.graphdef(dense)
    expected, found = values(dense), values(back)
    assert found.keys() == expected.keys()
    for path in expected:
        assert relative_error(found[path], expected[path]) <= 1e-5, path


def test_masked_equals_truncated_equals_merged(name):
    """(2) With other ranks in every layer, down to 0."""
    model, ranks = factored_of(name, with_s=True), lower(ROWS[name].ranks, 2)
    small = truncate(model, ranks)
    set_ranks(model, ranks)
    assert get_ranks(model) == get_ranks(small) == ranks
    for path, factors in find_factors(small).items():
        assert factors.max_rank == max(flatten_rank(ranks[path]))
    expected = outputs_of(model, name)
    assert relative_error(expected, dense_outputs(name)) > 1e-2
    assert relative_error(outputs_of(small, name), expected) <= 1e-6
    assert relative_error(outputs_of(merge(small), name), expected) <= 1e-5
    assert relative_error(outputs_of(merge(model), name), expected) <= 1e-5


def test_truncating_twice_equals_once(name):
    """(4) Bit for bit, also when the first cut leaves a mask inside a stack."""
    model, once = factored_of(name, with_s=True), lower(ROWS[name].ranks)
    twice = lower(once)
    direct = truncate(model, twice)
    steps = truncate(truncate(model, once), twice)
    assert nnx.graphdef(direct) == nnx.graphdef(steps)
    assert_same(values(direct), values(steps))


def test_a_masked_model_is_cut_as_if_its_tail_were_gone(name):
    """(rule of ranks) Bit for bit what a cut of the whole gives; no rank rises."""
    model, active = factored_of(name, with_s=True), lower(ROWS[name].ranks)
    ranks = lower(active)
    expected = truncate(model, ranks)
    set_ranks(model, active)
    assert_same(values(truncate(model, ranks)), values(expected))
    assert_same(
        values(truncate(model, active)),
        values(truncate(factored_of(name, with_s=True), active)),
    )
    with pytest.raises(ValueError) as error:
        truncate(model, ROWS[name].ranks)
    for path, rank in active.items():
        if flatten_rank(rank) != flatten_rank(ROWS[name].ranks[path]):
            assert f"{path}: rank must be in [0, " in str(error.value)
    set_ranks(model, ROWS[name].ranks)  # alone may raise it again
    assert get_ranks(model) == ROWS[name].ranks


@pytest.mark.parametrize("name", ["scanned", "convolutions"], indirect=True)
def test_a_stack_of_different_ranks_is_zero_past_them(name):
    """So that penalties over the allocated columns see nothing there."""
    small = truncate(factored_of(name, with_s=True), lower(ROWS[name].ranks))
    ragged = 0
    for factors in find_factors(small).values():
        mask = np.asarray(factors.mask())
        for array, axis in ((factors.u, -2), (factors.s, ()), (factors.v, -1)):
            columns = np.any(np.asarray(array[...]), axis)
            np.testing.assert_array_equal(columns, mask)
        ragged += not mask.all()
    assert ragged


def test_truncate_keeps_what_is_not_named(name):
    """Other layers keep their arrays and their active ranks, masks included."""
    model = factored_of(name)
    first, *others = ROWS[name].ranks
    set_ranks(model, lower(ROWS[name].ranks))
    small = truncate(model, {first: lower(ROWS[name].ranks)[first]})
    assert get_ranks(small) == get_ranks(model)
    for path in others:
        assert find_factors(small)[path].u.shape == find_factors(model)[path].u.shape


@pytest.mark.parametrize(
    "operation",
    [
        factorize,
        lambda model: factorize(model, [(".*", {"max_rank": 1, "with_s": True})]),
        lambda model: truncate(model, lower(max_ranks(model))),
        lambda model: truncate(model, {}),
        merge,
        canonicalize,
    ],
    ids=[
        "factorize",
        "factorize_low",
        "truncate",
        "truncate_nothing",
        "merge",
        "canon",
    ],
)
def test_surgery_leaves_its_input_alone(name, operation):
    """Bit for bit, and when the output's variables are changed afterwards."""
    for model in (dense_of(name), factored_of(name)):
        before, graph = values(model), nnx.graphdef(model)
        nodes = [id(node) for _, node in nnx.iter_graph(model)]
        spoil(operation(model))
        assert_same(values(model), before)
        assert nnx.graphdef(model) == graph
        assert [id(node) for _, node in nnx.iter_graph(model)] == nodes


def test_surgery_works_abstractly_and_under_jit(name):
    """The same shapes from `nnx.eval_shape`, the same numbers from `jax.jit`."""
    ranks = lower(ROWS[name].ranks)

    def build():
        model = canonicalize(factorize(ROWS[name].model(nnx.Rngs(0))))
        small = truncate(model, ranks)
        return small, merge(small)

    expected, abstract = build(), nnx.eval_shape(build)
    assert nnx.graphdef(abstract) == nnx.graphdef(expected)
    assert shapes(abstract) == shapes(expected)

    @jax.jit
    def surgery(state):
        model = nnx.merge(graph, state)
        small = truncate(canonicalize(factorize(model)), ranks)
        return nnx.state(merge(small))

    graph, state = nnx.split(dense_of(name))
    found = nnx.merge(graph, surgery(state))
    assert (
        relative_error(outputs_of(found, name), outputs_of(expected[1], name)) <= 1e-5
    )


def test_a_training_step_moves_active_columns_only(name):
    """(3) By jax.grad and optax on pure arrays: the loss falls, the tails stay."""
    model = factored_of(name, with_s=True)
    set_ranks(model, lower(ROWS[name].ranks, least=1))  # at 0 a layer hides others
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    inputs, optimizer = ROWS[name].inputs(), optax.sgd(1e-3)
    target = jnp.asarray(
        np.random.default_rng(3).normal(size=dense_outputs(name).shape), jnp.float32
    )

    @jax.jit
    def step(params, state):
        def loss(params):
            outputs = nnx.merge(graph, params, rest, copy=True)(inputs)
            return jnp.mean(jnp.square(outputs - target))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return value, updates, optax.apply_updates(params, updates), state

    params = nnx.as_pure(params)
    before, updates, new, state = step(params, optimizer.init(params))
    after, *_ = step(new, state)
    assert after < before
    factors = find_factors(model)
    updates = find_factors(nnx.merge(graph, updates, rest, copy=True))
    assert factors.keys() == updates.keys()
    for path, moved in updates.items():
        active = np.asarray(factors[path].mask())
        for part, axis in (("u", -2), ("s", ()), ("v", -1)):
            columns = np.any(np.asarray(getattr(moved, part)[...]), axis)
            np.testing.assert_array_equal(columns, active, f"{path}/{part}")


@pytest.mark.parametrize("with_s", [False, True])
def test_canonical_prefixes_are_the_best_ones(name, with_s):
    """(5) The function stays, spectra fall, each prefix is Eckart-Young's."""
    model = factored_of(name, with_s)
    for number, factors in enumerate(find_factors(model).values()):
        mix = np.random.default_rng(number).normal(size=factors.u.shape[-1:] * 2)
        mix = mix.astype(np.float32)  # any order of the columns, and not orthogonal
        factors.u.set_value(factors.u[...] @ mix)
        factors.v.set_value(np.linalg.inv(mix) @ factors.v[...])
    set_ranks(model, ROWS[name].ranks)
    canonical = canonicalize(model)
    assert get_ranks(canonical) == ROWS[name].ranks
    expected = outputs_of(model, name)
    assert relative_error(outputs_of(canonical, name), expected) <= 1e-5
    for path, factors in find_factors(canonical).items():
        matrix = np.asarray(find_factors(model)[path].matrix())
        size = np.linalg.norm(matrix)
        u, s, v = factors.arrays()
        scale = np.linalg.norm(u, axis=-2) * np.linalg.norm(v, axis=-1)
        importance = scale if s is None else scale * np.asarray(s)
        spectrum = np.linalg.svd(matrix, compute_uv=False)[..., : factors.max_rank]
        np.testing.assert_allclose(importance, spectrum, atol=1e-5 * size)
        for rank in range(factors.max_rank + 1):
            factors.set_rank(rank)
            error = np.linalg.norm(matrix - factors.matrix(), axis=(-2, -1))
            best = spectrum_error(matrix, rank)
            np.testing.assert_allclose(error, best, atol=1e-5 * size, err_msg=path)


def test_canonicalize_sees_active_columns_only():
    """What is masked is gone from the result, whose rank stays the active one."""
    model = factored_of("list")
    set_ranks(model, {"hidden/0": 2, "head": 0})
    canonical = canonicalize(model)
    assert get_ranks(canonical) == get_ranks(model)
    assert (
        relative_error(outputs_of(canonical, "list"), outputs_of(model, "list")) < 1e-5
    )
    for path, rank in (("hidden/0", 2), ("head", 0)):
        factors = find_factors(canonical)[path]
        norms = np.linalg.norm(factors.u[...], axis=0)
        assert np.all(norms[:rank] > 0.1) and np.all(norms[rank:] < 1e-3)
