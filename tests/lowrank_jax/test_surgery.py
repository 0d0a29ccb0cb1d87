"""Surgery on whole models: one table of models, one test for each promise.

A new kind of model, or of layer in one, is one more row. No model here knows of low
rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import relative_error, spectrum_error

from lowrank_jax.active import check_ranks, get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors, Rank
from lowrank_jax.layers import LAYERS, LowRankLayer, LowRankLinear
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.ranks import flatten_rank
from lowrank_jax.surgery import canonicalize, merge, truncate


def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers by NumPy: Flax's initialisers compile anew for every shape."""
    seed = (
        0 if isinstance(key, jax.core.Tracer) else np.asarray(jax.random.key_data(key))
    )
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, dtype)


DRAWN = {"kernel_init": draw, "bias_init": draw}
linear = functools.partial(nnx.Linear, **DRAWN)


class Chain(nnx.Module):
    """Linear layers in an `nnx.List`, tanh between."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.List([linear(5, 4, rngs=rngs), linear(4, 6, rngs=rngs)])
        self.head = linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, inputs):
        for layer in self.hidden:
            inputs = jnp.tanh(layer(inputs))
        return self.head(inputs)


class Convs(nnx.Module):
    """A strided, a dilated and a grouped convolution, and batch normalization."""

    def __init__(self, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, **DRAWN, rngs=rngs)
        self.strided = conv(2, 4, (3, 3), strides=2)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dilated = conv(4, 4, (2, 2), kernel_dilation=2, padding="VALID")
        self.grouped = conv(4, 6, (2, 1), feature_group_count=2)

    def __call__(self, images):
        return self.grouped(self.dilated(self.norm(self.strided(images))))


class Products(nnx.Module):
    """An einsum, and a general linear layer over two axes."""

    def __init__(self, rngs: nnx.Rngs):
        self.split = nnx.Einsum("bti,ihd->bthd", (4, 2, 3), (2, 3), **DRAWN, rngs=rngs)
        self.join = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), **DRAWN, rngs=rngs)

    def __call__(self, tokens):
        return self.join(jnp.tanh(self.split(tokens)))


class Block(nnx.Module):
    """A transformer block."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, **DRAWN, rngs=rngs)
        self.up = linear(4, 6, rngs=rngs)
        self.down = linear(6, 4, rngs=rngs)

    def __call__(self, tokens):
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens + self.down(nnx.gelu(self.up(tokens)))


class Language(nnx.Module):
    """An embedding whose table is also the head."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(7, 4, embedding_init=draw, rngs=rngs)
        self.body = linear(4, 4, rngs=rngs)

    def __call__(self, words):
        return self.table.attend(jnp.tanh(self.body(self.table(words))))


class TiedModules(nnx.Module):
    """One layer under two names, and in a list as well."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = linear(4, 4, rngs=rngs)
        self.second = self.first
        self.more = nnx.List([self.first, linear(4, 4, rngs=rngs)])

    def __call__(self, inputs):
        for layer in (self.first, self.second, *self.more):
            inputs = jnp.tanh(layer(inputs))
        return inputs


class TiedParams(nnx.Module):
    """Two layers with one kernel and two biases."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = linear(4, 4, rngs=rngs)
        self.second = linear(4, 4, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, inputs):
        return self.second(jnp.tanh(self.first(inputs)))


class Containers(nnx.Module):
    """Layers in a dict and a tuple that hold one another."""

    def __init__(self, rngs: nnx.Rngs):
        one, two, three, four = (linear(4, 4, rngs=rngs) for _ in range(4))
        self.by_name = nnx.data({"one": one, "pair": (two, three)})
        self.tuple = nnx.data((four, {"again": one}))

    def __call__(self, inputs):
        layers = [self.by_name["one"], *self.by_name["pair"]]
        for layer in (*layers, self.tuple[0], self.tuple[1]["again"]):
            inputs = jnp.tanh(layer(inputs))
        return inputs


class Scanned(nnx.Module):
    """Transformer blocks stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, axes: Any = 0):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return Block(rngs)

        self.blocks = build(rngs)
        for _, value in nnx.iter_graph(self.blocks):  # `draw` is the same for all three
            if isinstance(value, nnx.Param):
                scale = jnp.arange(1.0, 4.0).reshape(3, *[1] * (value.ndim - 1))
                value.set_value(value[...] / scale)
        self.axes = axes

    def __call__(self, tokens):
        @nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        def run(block, tokens):
            return block(tokens)

        return run(self.blocks, tokens)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, the shape of its input, and its layers' full ranks by path."""

    model: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    ranks: dict[str, Any]

    def inputs(self) -> jax.Array:
        random = np.random.default_rng(1)
        if self.model is Language:
            return jnp.asarray(random.integers(0, 7, self.shape), jnp.int32)
        return jnp.asarray(random.normal(size=self.shape), jnp.float32)


ATTENTION = [f"attention/{name}" for name in ("key", "out", "query", "value")]
ROWS = {
    "list": Row(Chain, (3, 5), {"head": 3, "hidden/0": 4, "hidden/1": 4}),
    "convolutions": Row(
        Convs, (2, 6, 6, 2), {"dilated": 4, "grouped": [3, 3], "strided": 4}
    ),
    "products": Row(Products, (2, 3, 4), {"join": 4, "split": 4}),
    "attention": Row(
        Block, (2, 3, 4), {**dict.fromkeys(ATTENTION, 4), "down": 4, "up": 4}
    ),
    "tied head": Row(Language, (2, 3), {"body": 4, "table": 4}),
    "tied modules": Row(TiedModules, (3, 4), {"first": 4, "more/1": 4}),
    "tied parameters": Row(TiedParams, (3, 4), {"first": 4}),
    "containers": Row(
        Containers,
        (3, 4),
        {"by_name/one": 4, "by_name/pair/0": 4, "by_name/pair/1": 4, "tuple/0": 4},
    ),
    "scanned": Row(
        Scanned,
        (2, 3, 4),
        {f"blocks/{name}": [4, 4, 4] for name in (*ATTENTION, "down", "up")},
    ),
}


@functools.cache
def parts(name: str, low_rank: bool, with_s: bool = False):
    model = ROWS[name].model(nnx.Rngs(0))
    return nnx.split(
        factorize(model, [(".*", {"with_s": with_s})]) if low_rank else model
    )


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def dense_of(name: str) -> nnx.Module:
    return nnx.merge(*parts(name, False), copy=True)


def factored_of(name: str, with_s: bool = False) -> nnx.Module:
    return nnx.merge(*parts(name, True, with_s), copy=True)


@functools.cache
def dense_outputs(name: str) -> np.ndarray:
    return outputs_of(dense_of(name), name)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, inputs):
    return nnx.merge(graph, state)(inputs)


def outputs_of(model: nnx.Module, name: str) -> np.ndarray:
    """What the model gives, compiled once for all models of one structure."""
    graph, state = nnx.split(model)
    return np.asarray(run(graph, nnx.as_pure(state), ROWS[name].inputs()))


def lower(ranks: dict[str, Any], down: int = 1, least: int = 0) -> dict[str, Any]:
    """Lower ranks, another number for each layer and each matrix of a stack."""

    def cut(rank: Any, by: int) -> Any:
        if isinstance(rank, int):
            return max(rank - by, least)
        return [cut(one, by + n) for n, one in enumerate(rank)]

    return {
        path: cut(rank, down + n % 3) for n, (path, rank) in enumerate(ranks.items())
    }


def values(model: nnx.Module) -> dict[str, np.ndarray]:
    """All arrays of a model by path, copied."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {
        "/".join(map(str, path)): np.array(
            jax.random.key_data(leaf[...])
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf[...]
        )
        for path, leaf in flat
    }


def shapes(model: nnx.Module) -> list[Any]:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(nnx.state(model))]


def assert_same(model: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert model.keys() == other.keys()
    for path in model:
        np.testing.assert_array_equal(model[path], other[path], path, strict=True)


def spoil(model: nnx.Module) -> None:
    """Changes every array of a model in place."""
    for _, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Param | nnx.BatchStat | Rank):
            value.set_value(value[...] + 1)


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


def test_shared_layers_are_one():
    """One `Factors` for all paths, which all name it in ranks and in rules."""
    model = factored_of("tied modules")
    assert model.first is model.second is model.more[0]
    assert find_aliases(model) == {"more/0": "first", "second": "first"}
    small = truncate(model, {"second": 2})
    assert small.more[0].factors.max_rank == 2 == get_ranks(small)["first"]
    set_ranks(model, {"more/0": 1})
    assert get_ranks(model)["first"] == 1
    back = merge(model)
    assert back.first is back.second is back.more[0] and type(back.first) is nnx.Linear
    by_alias = factorize(
        dense_of("tied modules"), [("second", {"max_rank": 2}), (".*", "dense")]
    )
    assert max_ranks(by_alias) == {"first": 2}
    assert type(by_alias.more[1]) is nnx.Linear


def test_shared_kernels_are_one():
    """Two layers, one `Factors` and two biases, there and back again."""
    model = factored_of("tied parameters")
    assert model.first.factors is model.second.factors
    assert model.first.bias is not model.second.bias
    assert find_aliases(model) == {"second": "first"}
    back = merge(truncate(model, {"second": 2}))
    assert back.first.kernel is back.second.kernel
    assert back.first.bias is not back.second.bias


def test_a_shared_kernel_takes_one_rule():
    """Different ranks for the two layers, or one left dense, would untie it
    silently."""
    rules = [("first", {"max_rank": 2}), ("second", {"max_rank": 3})]
    with pytest.raises(ValueError, match=r"(?s)first.*second|second.*first"):
        factorize(dense_of("tied parameters"), rules)
    with pytest.raises(ValueError, match=r"(?s)first.*second|second.*first"):
        factorize(dense_of("tied parameters"), [("first", "dense"), (".*", "full")])


def test_scanned_layers_have_ranks_of_their_own():
    """Each block at its own rank equals the blocks unrolled and cut one by one."""
    model = factored_of("scanned")
    ranks = lower(ROWS["scanned"].ranks)
    assert len({tuple(rank) for rank in ranks.values()}) > 1
    set_ranks(model, ranks)
    graph, state = nnx.split(model.blocks)
    tokens = ROWS["scanned"].inputs()
    for layer in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda x, n=layer: x[n], state))
        own = {path: rank[layer] for path, rank in ranks.items()}
        tokens = truncate(
            block, {p.removeprefix("blocks/"): r for p, r in own.items()}
        )(tokens)
    assert relative_error(outputs_of(model, "scanned"), tokens) <= 1e-6


def test_scanned_layers_take_ranks_per_example():
    """One rank for each layer and example equals the examples run one by one."""
    model = factored_of("scanned")
    inputs, examples = ROWS["scanned"].inputs(), 2
    table = np.random.default_rng(0).integers(0, 5, (3, examples))
    set_ranks(
        model, dict.fromkeys(ROWS["scanned"].ranks, jnp.asarray(table, jnp.int32))
    )
    found = outputs_of(model, "scanned")
    for example in range(examples):
        set_ranks(
            model, dict.fromkeys(ROWS["scanned"].ranks, table[:, example].tolist())
        )
        expected = model(inputs[example : example + 1])[0]
        assert relative_error(found[example], expected) <= 1e-5


def test_scanned_ranks_must_be_mapped_over_the_layers():
    """A scan that broadcasts all but parameters says so, and what to write instead."""
    axes = {nnx.Param: 0, ...: None}
    model = factorize(Scanned(nnx.Rngs(0), nnx.StateAxes(axes)))
    tokens = ROWS["scanned"].inputs()
    with pytest.raises(ValueError, match="StateAxes"):
        model(tokens)
    axes = {(nnx.Param, Rank): 0, ...: None}
    good = factorize(Scanned(nnx.Rngs(0), nnx.StateAxes(axes)))
    assert relative_error(good(tokens), dense_outputs("scanned")) <= 1e-5


def test_rules_choose_rank_scheme_and_what_stays_dense():
    """The first rule that matches decides; `max_rank` is clipped to the layer's."""
    rules = [
        ("strided", {"rank_fraction": 0.3, "scheme": 2}),
        ("dilated", {"max_rank": 99}),
        (".*", "dense"),
    ]
    model = factorize(dense_of("convolutions"), rules)
    assert max_ranks(model) == {"dilated": 4, "strided": 2}  # ceil(0.3 * 6)
    assert model.strided.fold.first_axes == (0,)
    assert type(model.grouped) is nnx.Conv


def test_rank_zero_may_be_allocated():
    """A layer that is born without columns is its bias."""
    model = factorize(nnx.Linear(4, 3, bias_init=draw, rngs=nnx.Rngs(0)), ALL_ZERO)
    np.testing.assert_array_equal(model(jnp.ones((1, 4)))[0], model.bias[...])
    assert max_ranks(model) == {"": 0} and get_ranks(canonicalize(model)) == {"": 0}


ALL_ZERO = [(".*", {"max_rank": 0})]


def test_the_model_itself_may_be_a_layer():
    """Its path is then the empty string, which rules and ranks can name."""
    model = factorize(linear(4, 3, rngs=nnx.Rngs(0)), [("", "full")])
    assert type(model) is LowRankLinear
    assert get_ranks(truncate(model, {"": 2})) == {"": 2}
    assert type(merge(model)) is nnx.Linear


def test_low_rank_layers_stay_as_they_are():
    """Factorizing twice is factorizing once; hand-made low-rank layers are found."""
    model = factored_of("list")
    again = factorize(model, [(".*", {"max_rank": 1})])
    assert_same(values(again), values(model))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    mixed = nnx.Sequential(
        LowRankLinear(4, 3, max_rank=2, rngs=nnx.Rngs(0)),
        linear(3, 2, rngs=nnx.Rngs(1)),
    )
    assert max_ranks(factorize(mixed)) == {"layers/0": 2, "layers/1": 2}


def test_masked_convolutions_and_odd_einsums_are_refused_together():
    """Layers without a low-rank form are named, all at once."""

    class Odd(nnx.Module):
        def __init__(self, rngs):
            mask = jnp.ones((2, 2, 2, 2))
            self.masked = nnx.Conv(2, 2, (2, 2), mask=mask, rngs=rngs)
            self.scaled = nnx.Einsum("bi,i->bi", (3,), kernel_init=draw, rngs=rngs)

    with pytest.raises(ValueError, match=r"(?s)^masked: .*\nscaled: "):
        factorize(Odd(nnx.Rngs(0)))


WRONG_RULES = {
    "unused": [(".*", "full"), ("encoder/.*", "dense"), ("heads", "dense")],
    "uncovered": [("head", "full")],
    "negative": [("hidden/.*", {"max_rank": -1}), ("head", "dense")],
    "bool": [("hidden/.*", {"max_rank": True}), ("head", "dense")],
    "float": [("hidden/.*", {"max_rank": 2.0}), ("head", "dense")],
    "fraction zero": [("hidden/.*", {"rank_fraction": 0.0}), ("head", "dense")],
    "fraction bool": [("hidden/.*", {"rank_fraction": True}), ("head", "dense")],
    "fraction text": [("hidden/.*", {"rank_fraction": "0.5"}), ("head", "dense")],
    "both": [("hidden/.*", {"max_rank": 1, "rank_fraction": 0.5}), ("head", "dense")],
    "scheme": [("hidden/.*", {"scheme": 0}), ("head", "dense")],
    "unknown word": [("hidden/.*", "half"), ("head", "dense")],
    "unknown key": [("hidden/.*", {"rank": 2}), ("head", "dense")],
    "number": [("hidden/.*", 3), ("head", "dense")],
    "pattern": [("hidden/(", "full"), ("head", "dense")],
}
NAMED = {
    "unused": ["encoder/.*", "heads", "hidden/0"],
    "fraction zero": ["hidden/0", "hidden/1", "(0, 1]", "0.0"],
    "fraction bool": ["hidden/0", "hidden/1", "rank_fraction", "True"],
    "fraction text": ["hidden/0", "hidden/1", "rank_fraction", "'0.5'"],
    "scheme": ["hidden/0", "hidden/1", "scheme"],
    "number": ["hidden/0", "hidden/1", "'dense'", "got 3"],
    "pattern": ["hidden/("],
}


BEGINS = {
    "unused": "every rule must match a layer, got no match for",
    "uncovered": "every layer must be covered by a rule, got none for",
    "pattern": "a pattern must be a regular expression",
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules_are_refused_with_all_offenders(case):
    """The message begins with the rule or the layer that breaks it, and names every
    layer or pattern, and what is allowed."""
    with pytest.raises(UserError) as error:
        factorize(dense_of("list"), WRONG_RULES[case])
    message = str(error.value)
    assert message.startswith(BEGINS.get(case, "hidden/0: "))
    for part in NAMED.get(case, ["hidden/0", "hidden/1"]):
        assert part in message, message


WRONG_RANKS = {
    "above": ({"hidden/0": 5, "head": 4}, ["hidden/0", "[0, 4]", "head", "[0, 3]"]),
    "negative": ({"hidden/0": -1, "head": -2}, ["hidden/0", "-1", "head", "-2"]),
    "bool": ({"hidden/0": True, "head": False}, ["hidden/0", "True", "head", "False"]),
    "float": ({"hidden/0": 2.0, "head": 1.5}, ["hidden/0", "2.0", "head", "1.5"]),
    "text": ({"head": "2"}, ["head", "'2'"]),
    "none": ({"head": None}, ["head", "None"]),
    "unknown": (
        {"body": 1, "tail": 1, "head": 9},
        ["body", "tail", "head", "hidden/0"],
    ),
    "list": ({"head": [1]}, ["head", "[1]"]),
}
WRONG_STACK_RANKS = {
    "above": ({"grouped": [1, 4], "strided": 7}, ["grouped", "[0, 3]", "strided"]),
    "short": ({"grouped": [1]}, ["grouped", "(2,)"]),
    "ragged": ({"grouped": [[1], [1, 2]]}, ["grouped", "(2,)"]),
    "bool": ({"grouped": [True, False]}, ["grouped", "True"]),
}


@pytest.mark.parametrize("operation", [truncate, set_ranks, check_ranks])
@pytest.mark.parametrize(
    ("name", "ranks", "parts"),
    [("list", *case) for case in WRONG_RANKS.values()]
    + [("convolutions", *case) for case in WRONG_STACK_RANKS.values()],
)
def test_wrong_ranks_are_refused_with_all_offenders(operation, name, ranks, parts):
    """(4) The message names every layer, its limit and what was given; nothing
    changes."""
    model = factored_of(name)
    with pytest.raises(ValueError) as error:
        operation(model, ranks)
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert get_ranks(model) == ROWS[name].ranks


def test_ranks_cannot_come_back_after_a_cut():
    """(4) The limit is what is allocated now, not what once was."""
    small = truncate(factored_of("list"), {"head": 1})
    with pytest.raises(ValueError, match=r"head: rank must be in \[0, 1\], got 2"):
        truncate(small, {"head": 2})


def test_set_ranks_recompiles_nothing():
    """(3) Ranks are arrays: one program runs them all, plain, traced or per stack."""
    model = factored_of("convolutions")
    traces = []

    @jax.jit
    def run(state):
        traces.append(None)
        return nnx.merge(graph, state)(ROWS["convolutions"].inputs())

    graph, state = nnx.split(model)
    results = [run(state)]
    for ranks in ({"grouped": 1}, {"grouped": [0, 2]}, {"strided": jnp.int32(2)}):
        set_ranks(model, ranks)
        assert nnx.graphdef(model) == graph
        results.append(run(nnx.state(model)))
    assert len(traces) == 1
    assert all(relative_error(x, results[0]) > 1e-3 for x in results[1:])


def test_low_rank_layers_are_low_rank_modules():
    """Every dense type in the table has a twin that names it."""
    assert all(issubclass(twin, LowRankLayer) for twin in LAYERS.values())
    assert all(twin.dense_type is dense for dense, twin in LAYERS.items())


def test_factors_that_are_not_finite_have_no_canonical_form():
    model = factorize(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    u = find_factors(model)["layers/0"].u
    u[...] = u[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="layers/0: factors must be finite"):
        canonicalize(model)
