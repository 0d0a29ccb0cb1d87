"""Shrinking: the cut run continues the masked one, optimizer by optimizer.

A new optimizer is one more row: elementwise, or named as started anew.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizer_rows import ELEMENTWISE, RESTARTED
from reference import relative_error
from two_layers import RANKS, masked_net, net, pure_params

from lowrank_jax.active import get_ranks, max_ranks
from lowrank_jax.optimizer_state import Cut, cut_opt_state
from lowrank_jax.shrinking import shrink
from lowrank_jax.surgery import truncate


@functools.partial(jax.jit, static_argnums=0)
def gradient(graph, params, rest, step):
    """Of a loss on a batch of its own for each step."""
    inputs = jnp.sin(jnp.arange(24.0).reshape(4, 6) * (1 + step))
    target = jnp.cos(jnp.arange(24.0).reshape(4, 6) * (2 + step))

    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params, rest)(inputs) - target))

    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def update(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def train(model, state, optimizer, steps: range):
    """The model and the optimizer state after these steps, on pure arrays."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    for step in steps:
        gradients = gradient(graph, params, rest, jnp.float32(step))
        params, state = update(optimizer, gradients, state, params)
    return nnx.merge(graph, params, rest), state


def by_path(tree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def acting(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """False for what a cut to `RANKS` makes zero: column 1 of the first group."""
    mask = np.ones(shape, bool)
    if len(shape) < 2 or not shape[0] == 2:  # a vector of a factored state
        return mask
    if "groups" in path and "['u']" in path:
        mask[0, :, 1] = False
    elif "groups" in path and ("['v']" in path or "['s']" in path):
        mask[0, 1] = False
    return mask


def heads(state, like):
    """The leading part of each array, of those of `like` its zeros as well."""
    full = by_path(state)
    for path, leaf in by_path(like).items():
        head = full[path][tuple(slice(size) for size in leaf.shape)]
        yield path, np.where(acting(path, leaf.shape), head, leaf)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_cut_run_continues_the_masked_one(name):
    """(6) 10 masked steps, or 5, a cut and 5 more: the same parameters on the head.

    The optimizer's state is that of the masked run, cut to the head, too.
    """
    optimizer, model = ELEMENTWISE[name], masked_net()
    state = optimizer.init(pure_params(model))
    model, state = train(model, state, optimizer, range(5))
    start = pure_params(truncate(model, RANKS))
    masked, masked_state = train(model, state, optimizer, range(5, 10))

    small, small_state, restarted = shrink(model, RANKS, state, optimizer)
    assert restarted == [] and get_ranks(small) == RANKS
    assert jax.tree.structure(small_state) == jax.tree.structure(state)
    cut = by_path(small_state)
    for path, head in heads(state, optimizer.init(pure_params(small))):
        np.testing.assert_array_equal(cut[path], head, path, strict=True)
    small, small_state = train(small, small_state, optimizer, range(5, 10))

    expected = by_path(pure_params(truncate(masked, RANKS)))
    found = by_path(pure_params(small))
    assert found.keys() == expected.keys()
    for path in found:
        assert relative_error(found[path], expected[path]) <= 1e-5, path
    assert any(relative_error(found[k], x) > 1e-4 for k, x in by_path(start).items())
    shapes = jax.tree.map(jnp.shape, optimizer.init(pure_params(small)))
    assert jax.tree.map(jnp.shape, small_state) == shapes
    cut = by_path(small_state)
    for path, head in heads(masked_state, small_state):
        np.testing.assert_allclose(cut[path], head, rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", RESTARTED)
def test_what_couples_numbers_starts_anew_and_is_named(name):
    """(6) Only that part of the state; what is beside it goes on; training runs."""
    optimizer, names = RESTARTED[name]
    model = masked_net()
    model, state = train(model, optimizer.init(pure_params(model)), optimizer, range(3))
    small, small_state, restarted = shrink(model, RANKS, state, optimizer)
    assert restarted == names
    fresh = optimizer.init(pure_params(small))
    assert jax.tree.structure(small_state) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, fresh)
    found, new = by_path(small_state), by_path(fresh)
    same = {path for path in new if np.array_equal(found[path], new[path])}
    assert same  # the restarted part
    for path, head in heads(state, fresh):  # all else is cut
        if path not in same:
            np.testing.assert_array_equal(found[path], head, path)
    if name != "adafactor":
        assert found.keys() - same
    train(small, small_state, optimizer, range(3, 4))


def test_square_second_moments_are_not_mistaken_for_the_parameter():
    """Adafactor's two vectors of a square matrix have its sizes: never cut by shape."""
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    model = masked_net()
    _, state, restarted = shrink(
        model, RANKS, optimizer.init(pure_params(model)), optimizer
    )
    assert "FactoredState" in restarted
    for leaf, new in zip(
        jax.tree.leaves(state),
        jax.tree.leaves(optimizer.init(pure_params(truncate(model, RANKS)))),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, new)


@pytest.mark.parametrize("pure", [False, True])
def test_states_of_variables_and_of_arrays_both_work(pure):
    """An optimizer made on `nnx.state` or on its pure form; the kind stays."""
    model, optimizer = masked_net(), optax.adam(1e-2)
    params = nnx.state(model, nnx.Param)
    params = nnx.as_pure(params) if pure else params
    state = optimizer.init(params)
    state = jax.tree.map(lambda x: x + 1, state)
    small, cut, _ = shrink(model, {"first": 2, "groups": 1}, state, optimizer)
    own = nnx.state(small, nnx.Param)
    own = nnx.as_pure(own) if pure else own
    expected = optimizer.init(own)
    assert jax.tree.structure(cut) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, expected)
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(cut))
    kinds = jax.tree.leaves(cut, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert any(isinstance(x, nnx.Variable) for x in kinds) != pure
    updates, cut = optimizer.update(jax.tree.map(jnp.ones_like, own), cut, own)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, expected)


def test_an_nnx_optimizer_is_cut_like_a_state():
    """`shrink(model, ranks, optimizer)`: its moments, its step; the old one stays."""
    model = masked_net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    state = optimizer.tx.init(pure_params(model))
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, ones)
    _, state = optimizer.tx.update(nnx.as_pure(ones), state, pure_params(model))
    small, cut, restarted = shrink(model, RANKS, optimizer)
    _, expected, _ = shrink(model, RANKS, state, optimizer.tx)
    assert restarted == [] and isinstance(cut, nnx.Optimizer)
    found = by_path(nnx.as_pure(cut.opt_state))
    assert found.keys() == by_path(expected).keys()
    for path, leaf in by_path(expected).items():
        np.testing.assert_array_equal(found[path], leaf, path)
    assert cut.step[...] == optimizer.step[...] == 1
    assert optimizer.opt_state[0].mu["first"]["factors"]["u"].shape == (6, 6)
    cut.update(small, jax.tree.map(jnp.ones_like, nnx.state(small, nnx.Param)))
    assert cut.step[...] == 2


def test_a_ragged_stack_keeps_nothing_past_its_ranks():
    """What a cut makes zero stays zero, momentum and weight decay or not."""
    model = nnx.merge(*net(), copy=True)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    model, state = train(model, optimizer.init(pure_params(model)), optimizer, range(3))
    small, state, _ = shrink(model, RANKS, state, optimizer)
    after, _ = train(small, state, optimizer, range(3, 5))
    for path, leaf in by_path(pure_params(after)).items():
        tail = ~acting(path, leaf.shape)
        assert not leaf[tail].any() and leaf[~tail].all(), path


def test_unchanged_ranks_change_nothing():
    """No cut, the same optimizer state, a model equal to the one given."""
    model, optimizer = masked_net(), optax.adam(1e-2)
    state = optimizer.init(pure_params(model))
    full = nnx.merge(*net(), copy=True)
    for given, ranks in ((model, {}), (full, max_ranks(full)), (full, {"groups": 3})):
        small, same, restarted = shrink(given, ranks, state, optimizer)
        assert same is state and restarted == []
        assert get_ranks(small) == get_ranks(given)
        assert nnx.graphdef(small) == nnx.graphdef(given) and small is not given
        for path, leaf in by_path(pure_params(given)).items():
            np.testing.assert_array_equal(by_path(pure_params(small))[path], leaf)
    assert get_ranks(model) == RANKS


def test_shrinking_leaves_its_input_alone_and_cuts_only_what_is_named():
    """The given model and state stay; other layers keep shapes and masks."""
    model, optimizer = masked_net(), optax.adam(1e-2)
    state = optimizer.init(pure_params(model))
    before = by_path((pure_params(model), state))
    small, cut, _ = shrink(model, {"first": 1}, state, optimizer)
    for path, leaf in by_path((pure_params(model), state)).items():
        np.testing.assert_array_equal(leaf, before[path], path, strict=True)
    assert get_ranks(model) == RANKS and get_ranks(small) == {**RANKS, "first": 1}
    assert max_ranks(small) == {**max_ranks(model), "first": 1}


def test_shrinking_to_rank_zero_leaves_a_bias_to_train():
    """Arrays without elements go through the optimizer as well."""
    model, optimizer = masked_net(), ELEMENTWISE["momentum"]
    model, state = train(model, optimizer.init(pure_params(model)), optimizer, range(2))
    zeros = {path: 0 for path in RANKS}
    small, state, restarted = shrink(model, zeros, state, optimizer)
    assert restarted == [] and max_ranks(small)["groups"] == [0, 0]
    after, _ = train(small, state, optimizer, range(2, 4))
    assert np.any(after.groups.bias[...] != small.groups.bias[...])


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"first": 7, "groups": -1}, r"(?s)first: .*\[0, 2\].*groups: "),
        ({"first": 6, "groups": [1, 3]}, r"(?s)first: .*\[0, 2\].*groups: .*\[1, 2\]"),
        ({"x": 1}, "'x'"),
    ],
)
def test_wrong_ranks_are_refused(ranks, message):
    """As `truncate` refuses them, all at once; no mask is taken off again."""
    model, optimizer = masked_net(), optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        shrink(model, ranks, optimizer.init(pure_params(model)), optimizer)


CUTS = {"['u']": Cut((4, 3), (4, 2))}


def test_an_unknown_state_starts_anew_and_is_named():
    """Somebody's own transformation is never cut by guess, a bare dict neither."""
    Norms = collections.namedtuple("Norms", ["norms"])

    def state(width, number):
        moment = {"u": jnp.full((4, width), number)}
        return optax.TraceState(moment), Norms(moment), {"moment": moment}

    cut, restarted = cut_opt_state(state(3, 1.0), state(2, 0.0), CUTS)
    assert restarted == ["Norms", "dict"]
    np.testing.assert_array_equal(cut[0].trace["u"], np.ones((4, 2)))
    np.testing.assert_array_equal(cut[1].norms["u"], np.zeros((4, 2)))
    np.testing.assert_array_equal(cut[2]["moment"]["u"], np.zeros((4, 2)))


@pytest.mark.parametrize(
    "moment", [{"v": jnp.ones((4, 3))}, {"u": jnp.ones((3, 4))}, jnp.ones(12)]
)
def test_a_moment_of_another_shape_or_place_starts_anew(moment):
    """Only what stands where the parameter stood, in its shape, is sliced."""
    fresh = jax.tree.map(lambda x: jnp.zeros(8), moment)
    cut, restarted = cut_opt_state(
        optax.TraceState(moment), optax.TraceState(fresh), CUTS
    )
    assert restarted == ["TraceState"]
    np.testing.assert_array_equal(*map(jax.tree.leaves, (cut.trace, fresh)))


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_flattened_moments_are_not_cut_as_a_prefix(name):
    """`optax.flatten`: one long vector, whose prefix belongs to other parameters."""
    optimizer = optax.chain(optax.ema(0.9), optax.flatten(ELEMENTWISE[name]))
    model = masked_net()
    model, state = train(model, optimizer.init(pure_params(model)), optimizer, range(2))
    small, cut, restarted = shrink(model, RANKS, state, optimizer)
    assert restarted == ["ScaleByAdamState" if name == "adam" else "TraceState"]
    for leaf in jax.tree.leaves(cut[1]):
        assert not np.any(leaf)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(cut[0]))
    train(small, cut, optimizer, range(2, 3))
