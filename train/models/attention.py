"""Multi-head attention, over tokens at hand or over keys and values that were kept.

The product is `jax.nn.dot_product_attention` with its own choice of a kernel; dropout
does not fall on the attention weights, which no fused kernel would allow.
Letters: `b` batch, `t` tokens that attend, `s` tokens that are attended to, `i`
features, `h` heads, `d` features of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

_LONGEST_WAVE = 10_000.0
"""Of both kinds of positions made of waves (Vaswani et al., 2017, section 3.5)."""


class Memory(NamedTuple):
    """Keys and values of the tokens that are attended to."""

    keys: Float[Array, "b s h d"]
    values: Float[Array, "b s h d"]


class Attention(nnx.Module):
    """`out(softmax(query(x) key(y)^T / sqrt(d)) value(y))`, head by head.

    `query`, `key`, `value` and `out` are each one matrix over all heads.

    Args:
      embed_dim: Features of each token.
      num_heads: Attention heads; divides `embed_dim`.
      rotary: Turns queries and keys by their positions (Su et al., 2021).
      use_bias: Whether the four projections have a bias.
      kernel_init: Draws the kernels of `query`, `key` and `value`.
      out_init: Draws the kernel of `out`.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        rotary: bool,
        use_bias: bool,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        def linear(init: nnx.Initializer) -> nnx.Linear:
            return nnx.Linear(
                embed_dim, embed_dim, use_bias=use_bias, kernel_init=init, rngs=rngs
            )

        self.num_heads = num_heads
        self.rotary = rotary
        self.query = linear(kernel_init)
        self.key = linear(kernel_init)
        self.value = linear(kernel_init)
        self.out = linear(out_init)

    def __call__(
        self,
        inputs: Float[Array, "b t i"],
        *,
        mask: Bool[Array, "#b 1 t t"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "b t i"]:
        """Returns what each token takes from those of its row.

        Args:
          inputs: The tokens, the first of each row at position 0.
          mask: True where a token (row) attends to one (column); None for everywhere.
          is_causal: Whether tokens attend to none after them.
        """
        memory = self.remember(inputs)
        return self.attend(inputs, memory, mask=mask, is_causal=is_causal)

    def decode(
        self,
        inputs: Float[Array, "b t i"],
        memory: Memory,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b t i"], Memory]:
        """Returns what new tokens take from those before, and the memory with them.

        Args:
          inputs: The new tokens.
          memory: Filled up to `position`, with room for the new tokens.
          position: Of the first new token.
        """
        new = self.remember(inputs, position)
        memory = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, 1),
            memory,
            new,
        )
        t, s = inputs.shape[1], memory.keys.shape[1]
        # What is not filled yet lies after every new token, hence is masked too.
        mask = jnp.arange(s)[None] <= position + jnp.arange(t)[:, None]
        outputs = self.attend(inputs, memory, position, mask=mask[None, None])
        return outputs, memory

    def remember(
        self, inputs: Float[Array, "b s i"], position: int | Int[Array, ""] = 0
    ) -> Memory:
        """Returns the keys and values of tokens, the first at this position."""
        keys = self._heads(self.key(inputs))
        keys = rotate(keys, position) if self.rotary else keys
        return Memory(keys, self._heads(self.value(inputs)))

    def attend(
        self,
        inputs: Float[Array, "b t i"],
        memory: Memory,
        position: int | Int[Array, ""] = 0,
        *,
        mask: Bool[Array, "#b 1 #t s"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "b t i"]:
        """Returns what tokens, the first at this position, take from a memory."""
        queries = self._heads(self.query(inputs))
        queries = rotate(queries, position) if self.rotary else queries
        outputs = jax.nn.dot_product_attention(
            queries, memory.keys, memory.values, mask=mask, is_causal=is_causal
        )
        return self.out(outputs.reshape(inputs.shape))

    def _heads(self, features: Float[Array, "b t i"]) -> Float[Array, "b t h d"]:
        return features.reshape(*features.shape[:2], self.num_heads, -1)


def empty_memory(
    batch: int, length: int, num_heads: int, head_dim: int, dtype: jnp.dtype
) -> Memory:
    """Makes a memory with room for so many tokens of each row."""
    zeros = jnp.zeros((batch, length, num_heads, head_dim), dtype)
    return Memory(zeros, zeros)


def waves(
    positions: Int[Array, "..."], features: int
) -> tuple[Float[Array, "... f"], Float[Array, "... f"]]:
    """Returns sines and cosines of positions at `features / 2` wavelengths."""
    steps = jnp.arange(features // 2, dtype=jnp.float32) * (2 / features)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), _LONGEST_WAVE**-steps)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    heads: Float[Array, "b t h d"], position: int | Int[Array, ""]
) -> Float[Array, "b t h d"]:
    """Turns feature n with feature n + d / 2 by an angle that grows with the position.

    The product of a query and a key then depends on how far apart they are alone.
    """
    sines, cosines = waves(position + jnp.arange(heads.shape[1]), heads.shape[-1])
    sines, cosines = sines[None, :, None], cosines[None, :, None]
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)


def logits(
    hidden: Float[Array, "b t i"], embedding: nnx.Embed, head: nnx.Module | None
) -> Float32[Array, "b t o"]:
    """Returns the head's logits of each token, the embedding's without a head.

    All tokens are rows of one matrix, for the sake of its gradient (`train.products`).
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    outputs = embedding.attend(rows) if head is None else head(rows)
    return outputs.reshape(*hidden.shape[:2], -1).astype(jnp.float32)


def invalid_past(
    most: int, position: Int[Array, ""], logits: Float[Array, "b t o"]
) -> Float[Array, "b t o"]:
    """Returns NaN for all logits once more tokens were decoded than fit.

    A traced position cannot be refused, and XLA writes past the end onto the last ones.
    """
    return jnp.where(position > most, jnp.nan, logits)
