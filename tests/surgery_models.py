"""Models of every kind for the tests of surgery, and what these compare.

A new kind of model, or of layer in one, is one more row of ROWS. No model here knows of
low rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Rank


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
