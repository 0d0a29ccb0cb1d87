"""Encoder-decoder transformer of translation (Vaswani et al., 2017), on packed rows.

A row holds several sentences side by side, told apart by their segments: 1, 2, ... in
this order, 0 for padding. Attention stays within a segment, positions restart in each,
so that a sentence gives the same logits wherever it lies. Linear layers of attention
have no bias; the 6 + 6 layers of width 512 have 44,101,632 parameters beside the
embedding.

Letters: `b` batch, `s` source tokens, `t` target tokens, `i` features, `o` vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Integer

from lowrank_jax.errors import raise_all
from train.models.attention import (
    Attention,
    Memory,
    empty_memory,
    invalid_past,
    logits,
    waves,
)
from train.models.sizes import block_problems, check_length, size_problems

_DRAW = nnx.initializers.xavier_uniform()


class Cache(NamedTuple):
    """What decoding remembers of the source and of the target tokens so far.

    Args:
      memory: Of each decoder block, of the target tokens.
      source: Of each decoder block, of the encoded source.
      visible: Which source tokens are no padding.
      position: How many target tokens there are.
    """

    memory: tuple[Memory, ...]
    source: tuple[Memory, ...]
    visible: Bool[Array, "b s"]
    position: Int[Array, ""]


class EncoderBlock(nnx.Module):
    """`norm(x + attention(x))`, then `norm(x + down(relu(up(x))))`.

    Args:
      embed_dim: Features of each token.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Features between `up` and `down`.
      dropout_rate: Fraction of each branch dropped in train mode; 0 builds none.
      rngs: Source of the initial values and of the dropout masks.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.attention = _attention(embed_dim, num_heads, rngs)
        self.attention_norm = nnx.LayerNorm(embed_dim, rngs=rngs)
        self.up = nnx.Linear(embed_dim, mlp_dim, kernel_init=_DRAW, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, embed_dim, kernel_init=_DRAW, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(embed_dim, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(
        self, hidden: Float[Array, "b s i"], mask: Bool[Array, "b 1 s s"]
    ) -> Float[Array, "b s i"]:
        """Returns the tokens of the next block."""
        branch = self.attention(hidden, mask=mask)
        return self.perceptron(self.attention_norm(hidden + self.dropout(branch)))

    def perceptron(self, hidden: Float[Array, "b s i"]) -> Float[Array, "b s i"]:
        """Returns what the second half of the block makes of its tokens."""
        branch = self.down(nnx.relu(self.up(hidden)))
        return self.mlp_norm(hidden + self.dropout(branch))


class DecoderBlock(EncoderBlock):
    """As `EncoderBlock`, causal, with attention to the source, `cross`, in between.

    Args:
      embed_dim: Features of each token.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Features between `up` and `down`.
      dropout_rate: Fraction of each branch dropped in train mode; 0 builds none.
      rngs: Source of the initial values and of the dropout masks.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(embed_dim, num_heads, mlp_dim, dropout_rate, rngs=rngs)
        self.cross = _attention(embed_dim, num_heads, rngs)
        self.cross_norm = nnx.LayerNorm(embed_dim, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "b t i"],
        mask: Bool[Array, "b 1 t t"],
        source: Memory,
        source_mask: Bool[Array, "b 1 t s"],
    ) -> Float[Array, "b t i"]:
        """Returns the tokens of the next block."""
        branch = self.attention(hidden, mask=mask, is_causal=True)
        return self._after(hidden, branch, source, source_mask)

    def decode(
        self,
        hidden: Float[Array, "b t i"],
        memory: Memory,
        source: Memory,
        source_mask: Bool[Array, "b 1 1 s"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b t i"], Memory]:
        """As a call, for new tokens from this position on, after those in memory."""
        branch, memory = self.attention.decode(hidden, memory, position)
        return self._after(hidden, branch, source, source_mask), memory

    def _after(
        self,
        hidden: Float[Array, "b t i"],
        branch: Float[Array, "b t i"],
        source: Memory,
        source_mask: Bool[Array, "b 1 #t s"],
    ) -> Float[Array, "b t i"]:
        hidden = self.attention_norm(hidden + self.dropout(branch))
        branch = self.cross.attend(hidden, source, mask=source_mask)
        return self.perceptron(self.cross_norm(hidden + self.dropout(branch)))


class EncoderDecoder(nnx.Module):
    """`embedding` of both sides, `encoder/0`, ..., `decoder/0`, ..., and the head.

    The embedding is scaled by the root of its width, then sinusoids are added.

    `train()` and `eval()` switch dropout on and off; a new model is in train mode.

    Args:
      vocab_size: Number of tokens there are, of both languages, and of logits.
      source_length: Most tokens of a source row.
      target_length: Most tokens of a target row.
      depth: Number of blocks of the encoder, and of the decoder.
      embed_dim: Features of each token; even.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Hidden features of each block's perceptron.
      dropout_rate: Fraction dropped in train mode, of the embedded tokens and of every
        branch of each block; 0 builds no dropout.
      tied: Whether the head is the embedding's transpose, else a layer `head`.
      rngs: Source of the initial values and of the dropout masks.

    Raises:
      ValueError: Sizes out of bounds, or that do not fit to each other.
    """

    def __init__(
        self,
        vocab_size: int,
        source_length: int,
        target_length: int,
        *,
        depth: int,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        tied: bool,
        rngs: nnx.Rngs,
    ):
        problems = size_problems(
            "encoder_decoder",
            vocab_size=vocab_size,
            source_length=source_length,
            target_length=target_length,
        )
        problems += block_problems(
            "encoder_decoder",
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            dropout_rate=dropout_rate,
        )
        if embed_dim % 2:
            problems.append(
                "encoder_decoder: embed_dim must be even, for a sine and a cosine of"
                f" each wavelength, got {embed_dim}. Add one."
            )
        raise_all(problems)
        self.source_length = source_length
        self.target_length = target_length
        self.embedding = nnx.Embed(
            vocab_size, embed_dim, embedding_init=_DRAW, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        sizes = (embed_dim, num_heads, mlp_dim, dropout_rate)
        self.encoder = nnx.List(EncoderBlock(*sizes, rngs=rngs) for _ in range(depth))
        self.decoder = nnx.List(DecoderBlock(*sizes, rngs=rngs) for _ in range(depth))
        self.head = (
            None
            if tied
            else nnx.Linear(
                embed_dim, vocab_size, use_bias=False, kernel_init=_DRAW, rngs=rngs
            )
        )

    def __call__(
        self,
        source: Int[Array, "b s"],
        target: Int[Array, "b t"],
        source_segment: Integer[Array, "b s"],
        target_segment: Integer[Array, "b t"],
    ) -> Float32[Array, "b t o"]:
        """Returns for each target token the logits of the next one of its sentence.

        Args:
          source: The sentences to translate.
          target: Their translations, each behind the token that begins a sentence, and
            without the one that ends it.
          source_segment: The sentence of each source token, 0 for padding.
          target_segment: That of each target token; those of number n translate the
            source tokens of number n.

        Raises:
          ValueError: More tokens than `source_length` or `target_length`.
        """
        check_length(
            "encoder_decoder", "target_length", self.target_length, target.shape[1]
        )
        encoded = self._encode(source, source_segment)
        hidden = self._embed(target, positions_in(target_segment))
        mask = _within(target_segment, target_segment)
        source_mask = _within(target_segment, source_segment)
        for block in self.decoder:
            memory = block.cross.remember(encoded)
            hidden = block(hidden, mask, memory, source_mask)
        return self._logits(hidden)

    def start(
        self, source: Int[Array, "b s"], source_segment: Integer[Array, "b s"]
    ) -> Cache:
        """Encodes the source, one sentence a row, and makes the cache of no target.

        Args:
          source: The sentences to translate.
          source_segment: 1 for their tokens, 0 for padding.

        Raises:
          ValueError: More tokens than `source_length`.
        """
        encoded = self._encode(source, source_segment)
        keys = tuple(block.cross.remember(encoded) for block in self.decoder)
        batch, _, heads, head_dim = keys[0].keys.shape
        empty = empty_memory(
            batch, self.target_length, heads, head_dim, keys[0].keys.dtype
        )
        memory = (empty,) * len(self.decoder)
        return Cache(memory, keys, source_segment != 0, jnp.int32(0))

    def decode(
        self, tokens: Int[Array, "b t"], cache: Cache
    ) -> tuple[Float32[Array, "b t o"], Cache]:
        """Returns the logits after new target tokens, and the cache with them in it.

        Their number is free. Past `target_length` all logits are NaN.

        Args:
          tokens: The new tokens, which follow those in the cache.
          cache: Of `start`, or of the tokens before them.

        Raises:
          ValueError: More new tokens than `target_length`.
        """
        length, position = tokens.shape[1], cache.position
        check_length("encoder_decoder", "target_length", self.target_length, length)
        positions = jnp.broadcast_to(position + jnp.arange(length), tokens.shape)
        hidden = self._embed(tokens, positions)
        mask = cache.visible[:, None, None]
        memories = []
        for block, memory, source in zip(
            self.decoder, cache.memory, cache.source, strict=True
        ):
            hidden, memory = block.decode(hidden, memory, source, mask, position)
            memories.append(memory)
        position = position + length
        outputs = invalid_past(self.target_length, position, self._logits(hidden))
        return outputs, cache._replace(memory=tuple(memories), position=position)

    def _encode(
        self, source: Int[Array, "b s"], segment: Integer[Array, "b s"]
    ) -> Float[Array, "b s i"]:
        check_length(
            "encoder_decoder", "source_length", self.source_length, source.shape[1]
        )
        hidden = self._embed(source, positions_in(segment))
        mask = _within(segment, segment)
        for block in self.encoder:
            hidden = block(hidden, mask)
        return hidden

    def _embed(
        self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t i"]:
        hidden = self.embedding(tokens)
        features = hidden.shape[-1]
        added = jnp.concatenate(waves(positions, features), axis=-1)
        hidden = hidden * math.sqrt(features) + added.astype(hidden.dtype)
        return self.dropout(hidden)

    def _logits(self, hidden: Float[Array, "b t i"]) -> Float32[Array, "b t o"]:
        return logits(hidden, self.embedding, self.head)


def positions_in(segments: Integer[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns for each token how many of its segment stand before it.

    >>> positions_in(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    previous = jnp.roll(segments, 1, axis=1)
    starts = jnp.where((segments != previous) & (index > 0), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def _within(
    queries: Integer[Array, "b t"], keys: Integer[Array, "b s"]
) -> Bool[Array, "b 1 t s"]:
    """True where both are of one segment, and for padding everywhere.

    A softmax over nothing would be NaN in some kernels; what padding sees, nobody does.
    """
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    return (queries == keys) | (queries == 0)


def _attention(embed_dim: int, num_heads: int, rngs: nnx.Rngs) -> Attention:
    return Attention(
        embed_dim,
        num_heads,
        rotary=False,
        use_bias=False,
        kernel_init=_DRAW,
        out_init=_DRAW,
        rngs=rngs,
    )


def build(
    *,
    vocab_size: int,
    source_length: int,
    target_length: int,
    rngs: nnx.Rngs,
    depth: int = 6,
    embed_dim: int = 512,
    num_heads: int = 8,
    mlp_dim: int = 2048,
    dropout_rate: float = 0.1,
    tied: bool = True,
) -> EncoderDecoder:
    """Builds an `EncoderDecoder` for rows of these lengths, of `vocab_size` tokens."""
    return EncoderDecoder(
        vocab_size,
        source_length,
        target_length,
        depth=depth,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        dropout_rate=dropout_rate,
        tied=tied,
        rngs=rngs,
    )
