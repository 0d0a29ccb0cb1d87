"""Models in the manner of public ones, whose code knows nothing of low rank.

They read kernels and tables, subclass Flax's layers, bring linear classes of their own,
hold matrices themselves.
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

FULL = ((".*", "full"),)


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


@functools.cache
def dense_parts(build):
    return nnx.split(build(rngs=nnx.Rngs(0)))


def models(row: Row) -> tuple[nnx.Module, nnx.Module]:
    """The dense model, and its low-rank twin at full rank."""
    dense = nnx.merge(*dense_parts(row.build), copy=True)
    return dense, factorize(dense, row.rules)
