"""Models in the manner of public ones, whose code knows nothing of low rank.

They read kernels and tables, subclass Flax's layers, bring linear classes of their own,
hold matrices themselves. One table of models, one test for each promise.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax import checkpoint
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import (
    DenseWarning,
    factorize,
    kernel_matrices,
    rules_of,
)
from lowrank_jax.layers import (
    LAYERS,
    LowRankLayer,
    LowRankLinear,
    LowRankParam,
    low_rank_type,
    register,
)
from lowrank_jax.paths import find_factors, find_layers
from lowrank_jax.surgery import merge, truncate

FULL = ((".*", "full"),)
pytestmark = pytest.mark.filterwarnings("ignore:.*value' access:DeprecationWarning")


def normal(rngs: nnx.Rngs, *shape: int) -> jax.Array:
    seed = int(rngs.params.key.get_value().size) + sum(shape)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


class TiedHead(nnx.Module):
    """A language model whose head reads the table, as GPT-2 and Gemma do."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.body = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, words):
        hidden = self.norm(jnp.tanh(self.body(self.embed(words))))
        logits = jnp.dot(hidden, self.embed.embedding[...].T)
        return logits + 0.1 * hidden @ self.embed.embedding.T


class TiedParam(nnx.Module):
    """A head that holds the table's own Param."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.a_head = self.embed.embedding
        self.body = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, words):
        return jnp.tanh(self.body(self.embed(words))) @ self.a_head.T


class Attention(nnx.Module):
    """Attention that takes its sizes from its kernels."""

    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.key = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.value = nnx.Linear(4, 6, rngs=rngs)
        self.out = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, tokens):
        _, heads, size = self.query.kernel.shape
        assert self.value.kernel.shape == (tokens.shape[-1], heads * size)
        value = self.value(tokens).reshape(*tokens.shape[:-1], heads, size)
        scores = jnp.einsum("bthd,bshd->bhts", self.query(tokens), self.key(tokens))
        weights = jax.nn.softmax(scores / size**0.5)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value)
        return self.out(mixed.reshape(*tokens.shape[:-1], -1))


class Standardized(nnx.Conv):
    """A convolution with weight standardization, as of BiT."""

    def __call__(self, inputs):
        kernel = self.kernel[...]
        axes = tuple(range(kernel.ndim - 1))
        centred = kernel - kernel.mean(axes, keepdims=True)
        scaled = centred / (kernel.std(axes, keepdims=True) + 1e-3)
        outputs = jax.lax.conv_general_dilated(
            inputs,
            scaled,
            self.strides,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return outputs + self.bias[...]


class Scaled(nnx.Linear):
    """A linear layer with a gain, by way of Flax's own forward."""

    def __init__(self, *args, rngs: nnx.Rngs):
        super().__init__(*args, rngs=rngs)
        self.gain = nnx.Param(jnp.full((), 1.5))

    def __call__(self, inputs):
        return self.gain * super().__call__(inputs)


class Named(nnx.Linear):
    """A linear layer that only adds a method."""

    def fan(self) -> int:
        return self.kernel.shape[0]


class Subclasses(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = Standardized(2, 4, (3, 3), strides=(1, 1), rngs=rngs)
        self.scaled = Scaled(4, 6, rngs=rngs)
        self.named = Named(6, 3, rngs=rngs)

    def __call__(self, images):
        hidden = jnp.tanh(self.scaled(self.conv(images)))
        return self.named(hidden) / self.named.fan() ** 0.5


class Dense(nnx.Module):
    """A linear layer in the manner of PyTorch: `weight (o, i)`, used transposed."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal(rngs, outputs, inputs))
        self.bias = nnx.Param(jnp.ones(outputs))
        self.size = outputs

    def __call__(self, inputs):
        assert self.weight.shape[0] == self.size
        return jnp.dot(inputs, self.weight.value.T) + self.bias[...]


class Experts(nnx.Module):
    """One matrix for each expert."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernels = nnx.Param(normal(rngs, 2, 6, 5))

    def __call__(self, inputs):
        return jnp.einsum("bi,eio->beo", inputs, self.kernels[...]).sum(axis=1)


class Foreign(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = Dense(4, 6, rngs)
        self.experts = Experts(rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.last(jnp.tanh(self.experts(jnp.tanh(self.first(inputs)))))


class Autoencoder(nnx.Module):
    """Strided convolutions down, transposed ones up."""

    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(2, 6, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (4, 4), strides=(2, 2), rngs=rngs)
        self.turned = nnx.ConvTranspose(
            4, 2, (3, 3), transpose_kernel=True, use_bias=False, rngs=rngs
        )

    def __call__(self, images):
        return self.turned(jnp.tanh(self.up(jnp.tanh(self.down(images)))))


class Bare(nnx.Module):
    """A model that holds its projections itself, as CLIP does."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(4, 6, rngs=rngs)
        self.position_embedding = nnx.Param(normal(rngs, 3, 4))
        self.projection = nnx.Param(normal(rngs, 6, 5))
        self.mixers = nnx.List(nnx.Param(normal(rngs, 5, 5)) for _ in range(2))
        self.again = self.mixers[1]

    def __call__(self, tokens):
        hidden = jnp.tanh(self.body(tokens + self.position_embedding[...]))
        assert self.projection.shape == (6, 5) and self.projection.dtype == hidden.dtype
        hidden = jnp.tanh(hidden @ self.projection)
        for mixer in self.mixers:
            hidden = hidden + hidden @ mixer.value
        return hidden - hidden @ self.again.T + 0.1 * hidden @ (2 * self.mixers[0][...])


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, how it is factored, and what to call it with.

    Args:
      build: Makes the model.
      shape: Shape of the input; integers below 11 for words.
      rules: How it is factored.
      paths: Its factored layers.
      unseen: What the count cannot see.
    """

    build: Callable[..., nnx.Module]
    shape: tuple[int, ...]
    paths: set[str]
    rules: tuple[tuple[str, Any], ...] = FULL
    unseen: frozenset[str] = frozenset()

    @property
    def inputs(self) -> jax.Array:
        random = np.random.default_rng(1)
        if self.build in (TiedHead, TiedParam):
            return jnp.asarray(random.integers(0, 11, self.shape), jnp.int32)
        return jnp.asarray(random.normal(size=self.shape), jnp.float32)


PARAMS = ("projection|mixers/.", {"param": True})
ROWS = {
    "tied head": Row(TiedHead, (2, 5), {"embed", "body"}),
    "tied Param": Row(TiedParam, (2, 5), {"a_head", "body"}),
    "attention": Row(Attention, (2, 3, 4), {"query", "key", "value", "out"}),
    "subclasses": Row(Subclasses, (2, 5, 5, 2), {"conv", "scaled", "named"}),
    "own classes": Row(Foreign, (3, 4), {"first", "experts", "last"}),
    "autoencoder": Row(Autoencoder, (2, 6, 6, 2), {"down", "up", "turned"}),
    "bare Params": Row(
        Bare,
        (2, 3, 4),
        {"body", "projection", "again", "mixers/0"},
        (PARAMS, (".*", "full")),
        frozenset({"projection", "again", "mixers/0"}),
    ),
}


@pytest.fixture(autouse=True)
def registered():
    """Classes of the test's own are in the table while it runs; they broadcast as
    NumPy does, as others' code."""
    before = dict(LAYERS)
    register(Dense, kernel="weight", inputs=(1,), outputs=(0,))
    register(Experts, kernel="kernels", stack=(0,), inputs=(1,), outputs=(2,))
    with jax.numpy_rank_promotion("allow"):
        yield
    LAYERS.clear()
    LAYERS.update(before)


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@functools.cache
def dense_parts(build):
    return nnx.split(build(rngs=nnx.Rngs(0)))


def models(row: Row) -> tuple[nnx.Module, nnx.Module]:
    """The dense model, and its low-rank twin at full rank."""
    dense = nnx.merge(*dense_parts(row.build), copy=True)
    return dense, factorize(dense, row.rules)


def run(model: nnx.Module, inputs: jax.Array) -> jax.Array:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, inputs)


def lower(model: nnx.Module) -> dict[str, Any]:
    """About half of each rank, of stacks a different one for each matrix."""
    return {
        path: (np.asarray(rank) + np.arange(np.size(rank)).reshape(np.shape(rank))) // 2
        for path, rank in max_ranks(model).items()
    }


def plain(ranks: dict[str, Any]) -> dict[str, Any]:
    return {path: np.asarray(rank).tolist() for path, rank in ranks.items()}


def test_full_rank_equals_dense(row):
    """Every layer that the row names is factored, none in silence left dense."""
    dense, low = models(row)
    assert set(find_factors(low)) == row.paths
    assert relative_error(run(low, row.inputs), run(dense, row.inputs)) <= 1e-5
    assert relative_error(low(row.inputs), dense(row.inputs)) <= 1e-5


def test_masked_equals_cut_equals_merged(row):
    """At half the ranks; merged models have the structure of the dense one."""
    dense, low = models(row)
    ranks = plain(lower(low))
    set_ranks(low, ranks)
    expected = run(low, row.inputs)
    assert relative_error(expected, run(dense, row.inputs)) > 1e-3
    cut, merged = truncate(low, ranks), merge(low)
    assert nnx.graphdef(merged) == nnx.graphdef(dense)
    assert relative_error(run(cut, row.inputs), expected) <= 1e-5
    assert relative_error(run(merged, row.inputs), expected) <= 1e-5
    assert relative_error(run(merge(cut), row.inputs), expected) <= 1e-5


def test_gradients_reach_the_head_and_not_the_tail(row):
    """Exactly zero past the rank, in every Param of the factors, and only there."""
    _, low = models(row)
    ranks = lower(low)
    set_ranks(low, plain(ranks))
    graph, params, rest = nnx.split(low, nnx.Param, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(row.inputs)))

        return jax.grad(loss)(params)

    grads = nnx.merge(graph, gradient(params), rest)
    for path, factors in find_factors(grads).items():
        u, v = np.asarray(factors.u[...]), np.asarray(factors.v[...])
        for columns in (u, np.swapaxes(v, -1, -2)):
            acts = np.arange(columns.shape[-1]) < ranks[path][..., None]
            moved = np.any(columns, axis=-2)
            np.testing.assert_array_equal(moved, acts, str(path))


def test_a_checkpoint_brings_the_model_back(row, tmp_path):
    """Saved masked, loaded into a fresh twin, and by the rules that it knows."""
    dense, low = models(row)
    set_ranks(low, plain(lower(low)))
    checkpoint.save(tmp_path / "saved", low)
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    graph, state = nnx.split(dense)
    zeros = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    fresh = factorize(zeros, rules_of(low))
    loaded = checkpoint.load(saved, fresh)
    np.testing.assert_array_equal(run(loaded, row.inputs), run(low, row.inputs))


def test_the_count_is_that_of_the_dense_twin(row):
    """Parameters and MACs agree, and what is not seen is named."""
    dense, low = models(row)
    example = jax.ShapeDtypeStruct((1, *row.shape[1:]), row.inputs.dtype)
    cost, twin = count(low, example), count(dense, example)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(dense, nnx.Param))]
    assert cost.dense_params == twin.dense_params == sum(sizes)
    assert cost.dense_macs == twin.dense_macs > 0
    assert cost.unseen == twin.unseen and set(cost.unseen) == row.unseen
    small = truncate(low, dict.fromkeys(find_factors(low), 1))
    sizes = [x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param))]
    ones = jax.tree.map(np.ones_like, max_ranks(low))
    assert cost.params(plain(ones)) == sum(sizes)


def test_a_tied_head_stays_tied():
    """One table: in the twin, after merging, and in its gradient."""
    _, low = models(ROWS["tied Param"])
    assert isinstance(low.a_head, LowRankParam)
    assert low.a_head.factors is low.embed.factors
    merged = merge(low)
    assert merged.a_head is merged.embed.embedding
    assert rules_of(low) == rules_of(factorize(merged))


def test_a_kernel_is_read_at_the_active_rank_and_differentiably():
    """Under jit and grad, as what foreign code multiplies by."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(2)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        layer = nnx.merge(graph, params, rest)
        assert layer.kernel.shape == (5, 4)
        return jnp.sum(jnp.ones((3, 5)) @ layer.kernel)

    grads = nnx.to_pure_dict(gradient(params))["factors"]
    np.testing.assert_array_equal(grads["u"][:, 2:], 0)
    assert np.all(np.any(grads["u"][:, :2], axis=0))
    assert np.linalg.matrix_rank(np.asarray(layer.kernel)) == 2


READS: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda kernel: jnp.matmul(jnp.ones((2, 5)), kernel),
    "dot": lambda kernel: jnp.dot(jnp.ones((2, 5)), kernel),
    "einsum": lambda kernel: jnp.einsum("bi,io->bo", jnp.ones((2, 5)), kernel),
    "sum": jnp.sum,
    "take": lambda kernel: jnp.take(kernel, jnp.array([1, 3]), axis=0),
    "stack": lambda kernel: jnp.stack([kernel, kernel]),
    "asarray": jnp.asarray,
    "astype": lambda kernel: kernel.astype(jnp.bfloat16),
    "jit": jax.jit(lambda kernel: 2 * kernel + kernel[...]),
    "closure": lambda kernel: jax.jit(lambda x: jnp.dot(x, kernel))(jnp.ones((2, 5))),
    "vmap": jax.vmap(lambda row: row * 2),
    "scan": lambda kernel: jax.lax.scan(lambda c, row: (c, row * 1), 0, kernel)[1],
    "tree": lambda kernel: jax.tree.leaves(kernel)[0],
    "penalty": lambda kernel: sum(jnp.sum(x**2) for x in jax.tree.leaves(kernel)),
    "raw value": lambda kernel: kernel.get_raw_value(),
    "metadata": lambda kernel: jnp.asarray(len(kernel.get_metadata())),
    "sharding": lambda kernel: jnp.asarray(kernel.sharding_names is None),
}


@pytest.mark.filterwarnings("ignore:.*sharding_names:DeprecationWarning")
@pytest.mark.parametrize("case", READS)
def test_what_takes_a_param_takes_a_merged_kernel(case):
    """The same numbers from a dense Param and from the merged one, and gradients."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(2)
    read, dense = READS[case], merge(layer)
    expected = read(dense.kernel)
    found = read(layer.kernel)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=1e-6
    )
    if case not in ("metadata", "sharding"):
        loss = nnx.grad(lambda m: jnp.sum(jnp.float32(read(m.kernel)) ** 2))
        assert np.any(loss(layer)["factors"]["u"][...])
    assert "kernel" not in nnx.to_pure_dict(nnx.state(layer))


def test_reads_of_an_abstract_model_have_shapes():
    model = nnx.eval_shape(lambda: factorize(Attention(nnx.Rngs(0))))
    assert model.query.kernel.shape == model.query.kernel[...].shape == (4, 2, 3)


def test_shapes_are_known_at_a_rank_per_example():
    """Foreign code may check shapes while a sampler draws a rank for each example."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(np.array([1, 2, 3]))
    assert layer.kernel.shape == (5, 4)
    for read in (lambda kernel: kernel[...], jnp.sum):
        with pytest.raises(UserError, match="must be one number to merge"):
            read(layer.kernel)


def test_a_subclass_that_keeps_the_forward_multiplies_by_the_factors():
    """Its own methods stay; one that changes the forward runs its own code."""
    named = low_rank_type(Named).from_dense(Named(6, 3, rngs=nnx.Rngs(0)))
    assert isinstance(named, LowRankLinear | Named) and named.fan() == 6
    assert isinstance(named, LowRankLinear) and isinstance(named, Named)
    assert not issubclass(low_rank_type(Scaled), LowRankLinear)
    made = low_rank_type(Scaled)(6, 3, max_rank=2, rngs=nnx.Rngs(0))
    assert made.factors.max_rank == 2 and type(made.to_dense()) is Scaled
    assert low_rank_type(type(made)) is None and low_rank_type(nnx.LayerNorm) is None


class Base(nnx.Linear):
    """A base of a project's own, whose forward runs and reads more than one name."""

    gain = 2.0

    def scale(self, inputs):
        return self.gain * inputs

    @property
    def power(self):
        return 1

    def __call__(self, inputs):
        return super().__call__(self.scale(inputs)) ** self.power


class Double:
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


BODIES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "new names": ({"__doc__": "Mine.", "fan": lambda self: 3, "size": 3}, False),
    "annotations": ({"__annotations__": {"gain": float}, "__module__": "my"}, False),
    "__init__": (
        {"__init__": lambda self, *a, **k: Base.__init__(self, 6, 3, **k)},
        False,
    ),
    "the same": ({"__call__": Base.__call__}, False),
    "__call__": ({"__call__": lambda self, inputs: inputs}, True),
    "a method": ({"scale": lambda self, inputs: 3 * inputs}, True),
    "a property": ({"power": property(lambda self: 2)}, True),
    "a constant": ({"gain": 3.0}, True),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_a_subclass_changes_of_the_forward(case):
    """All that the base's forward may reach by a name, and nothing else."""
    body, changes = BODIES[case]
    register(Base, type("LowRankBase", (LowRankLinear,), {"dense_type": Base}))
    kind = low_rank_type(type("Sub", (Base,), body))
    assert issubclass(kind, LowRankLinear) is not changes


def test_a_mixin_before_the_base_changes_the_forward():
    mixed = type("Mixed", (Double, nnx.Linear), {})
    assert not issubclass(low_rank_type(mixed), LowRankLinear)
    after = type("After", (nnx.Linear, Double), {})
    assert issubclass(low_rank_type(after), LowRankLinear)


def test_an_own_forward_costs_its_dense_macs_at_every_rank():
    """It runs merged; at rank 0 nothing is left to run."""
    low = factorize(Scaled(6, 4, rngs=nnx.Rngs(0)))
    cost = count(low, jax.ShapeDtypeStruct((1, 6), "float32"))
    assert [cost.macs({"": rank}) for rank in range(5)] == [0, 24, 24, 24, 24]
    assert cost.params({"": 1}) == 6 + 4 + 4 + 1


def test_a_state_of_the_subclass_is_kept():
    """Its own forward runs on the low-rank layer itself, not on a copy."""

    class Counting(nnx.Linear):
        def __init__(self, *args, rngs):
            super().__init__(*args, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, inputs):
            self.calls[...] += 1
            return super().__call__(inputs)

    low = factorize(Counting(4, 3, rngs=nnx.Rngs(0)))
    nnx.jit(lambda model, x: model(x))(low, jnp.ones((2, 4)))
    assert low.calls[...] == 1 and isinstance(low, Counting)


def test_what_stays_dense_is_named_in_one_warning():
    """With its share of the parameters; a position table and norms are no matrices."""
    model = Bare(nnx.Rngs(0))
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    with pytest.warns(DenseWarning) as caught:
        low = factorize(model)
    (warning,) = caught
    message = str(warning.message)
    for path, size in (("again", 25), ("mixers/0", 25), ("projection", 30)):
        assert f"{path} ({size / total:.1%})" in message
    assert f"{80 / total:.1%} of the parameters" in message
    assert "position" not in message and set(find_factors(low)) == {"body"}
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "rules",
    [
        [("body", "full"), (".*", "dense")],
        [("projection|mixers/.", "dense"), (".*", "full")],
        [("projection", {"param": True}), ("mixers/.", "dense"), (".*", "full")],
    ],
    ids=["all the rest", "by name", "some"],
)
def test_a_rule_that_says_dense_is_silent(rules):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        low = factorize(Bare(nnx.Rngs(0)), rules)
    named = {"projection"} & {pattern for pattern, rule in rules if "param" in rule}
    assert set(find_factors(low)) == {"body"} | named


WRONG = {
    "a layer": ([("body", {"param": True}), (".*", "full")], "body: param: true is"),
    "everything": ([(".*", {"param": True})], "body: param: true is for a matrix"),
    "not for Params": ([("projection", {"param": False}), (".*", "full")], "got False"),
    "scheme": (
        [("projection", {"param": True, "scheme": 1}), (".*", "dense")],
        "projection: scheme is for convolutions",
    ),
    "positions": (
        [("position_embedding", {"param": True}), (".*", "full")],
        "no match for",
    ),
    "without param": ([("projection", {"max_rank": 2}), (".*", "full")], "no match fo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_for_params_are_refused(case):
    rules, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        factorize(Bare(nnx.Rngs(0)), rules)


PAIRS = {
    "three": [(".*", "full", 1)],
    "one": [(".*",)],
    "text": ["ab"],
    "no pattern": [(3, "full")],
    "a mapping": {".*": "full"},
}


@pytest.mark.parametrize("case", PAIRS)
def test_rules_that_are_no_pairs_are_refused(case):
    with pytest.raises(UserError, match="rules: must be pairs of a pattern .*, got"):
        factorize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), PAIRS[case])


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (nnx.Linear, {"max_rank": -1}, "^the model itself: max_rank must be a whole"),
        (nnx.Linear, 3, "^the model itself: a rule must be 'dense', 'full' or a map"),
    ],
)
def test_a_model_that_is_a_layer_is_named_so(model, rule, message):
    with pytest.raises(UserError, match=message):
        factorize(model(4, 3, rngs=nnx.Rngs(0)), [(".*", rule)])


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError])
def test_a_bug_in_a_layer_of_ones_own_keeps_its_traceback(bug):
    """It is no mistake in the rules, of `factorize` nor of what is read dense."""

    class Other(nnx.Linear):
        pass

    class LowRankOther(LowRankLinear):
        @classmethod
        def fold_of(cls, dense):
            raise bug("of the user")

    register(Other, LowRankOther)
    model = Other(4, 3, rngs=nnx.Rngs(0))
    for read in (factorize, kernel_matrices):
        with pytest.raises(bug, match="of the user") as error:
            read(model)
        assert not isinstance(error.value, UserError)


def test_a_model_without_layers_is_told_what_is_known():
    """The types of the table, those of the model, and its matrices."""

    class Own(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones((3, 4)))

    with pytest.raises(UserError) as error:
        factorize(nnx.Sequential(Own()))
    for part in ("ConvTranspose", "Linear", "Own", "Sequential", "layers/0/weight"):
        assert part in str(error.value)


def test_registering_is_checked():
    """Twice, of no module, with axes that are not those of a kernel."""
    with pytest.raises(UserError, match="Dense must not be in the table yet"):
        register(Dense, kernel="weight")
    with pytest.raises(UserError, match="must be given a class of NNX modules"):
        register(dict)

    class Other(nnx.Module):
        pass

    for axes in ({"inputs": (0,), "outputs": (0,)}, {"inputs": (), "outputs": (0,)}):
        with pytest.raises(UserError, match=r"register\(Other\): inputs, outputs and"):
            register(Other, **axes)
    assert Other not in LAYERS


def test_a_class_with_its_own_low_rank_layer_is_one_row():
    """A low-rank type of one's own beside the dense one."""

    class LowRankOther(LowRankLinear):
        pass

    class Other(nnx.Module):
        pass

    assert register(Other, LowRankOther) is LowRankOther
    assert low_rank_type(Other) is LowRankOther


def test_a_twin_with_attributes_named_like_ours_is_refused():
    class Clash(nnx.Linear):
        def __init__(self, *args, rngs):
            super().__init__(*args, rngs=rngs)
            self.factors = 3

    with pytest.raises(UserError, match=r"Clash: \['factors', 'fold'\] are the low"):
        factorize(Clash(4, 3, rngs=nnx.Rngs(0)))


def test_stacked_subclasses_and_params_run_in_scan():
    """Modules stacked by `nnx.vmap`, each layer at a rank of its own."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = Scaled(4, 4, rngs=rngs)
            self.mixer = nnx.Param(rngs.params.normal((4, 4)))
            self.norm = nnx.LayerNorm(4, rngs=rngs)

        def __call__(self, inputs):
            return self.norm(jnp.tanh(self.linear(inputs)) @ self.mixer)

    stack = nnx.vmap(Block)(nnx.Rngs(0).split(3))
    low = factorize(stack, [("mixer", {"param": True}), (".*", "full")])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)

    def scan(blocks):
        run = nnx.scan(
            lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return run(blocks, inputs)

    assert relative_error(scan(low), scan(stack)) <= 1e-5
    set_ranks(low, {"linear": [1, 2, 3], "mixer": [4, 2, 0]})
    assert relative_error(scan(low), scan(merge(low))) <= 1e-5
    assert all(
        isinstance(layer, LowRankLayer) for layer, _ in find_layers(low).values()
    )
