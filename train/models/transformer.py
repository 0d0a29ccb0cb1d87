"""Decoder-only transformer of language models (Radford et al., 2019), pre-norm.

Letters: `b` batch, `t` tokens, `i` features, `o` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from lowrank_jax.errors import raise_all
from train.models.attention import (
    Attention,
    Memory,
    empty_memory,
    invalid_past,
    logits,
)
from train.models.sizes import block_problems, check_length, size_problems

POSITIONS = ("learned", "rotary")
_DRAW = nnx.initializers.normal(0.02)


class Cache(NamedTuple):
    """What decoding remembers of the tokens so far.

    Args:
      memory: Of each block: a tuple, or with a leading layer axis where they are
        scanned.
      position: How many tokens there are.
    """

    memory: tuple[Memory, ...] | Memory
    position: Int[Array, ""]


class Block(nnx.Module):
    """Causal self-attention, then `down(gelu(up(...)))`, each normalized first and
    added.

    Dropout falls on the two branches.

    Args:
      embed_dim: Features of each token.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Features between `up` and `down`.
      dropout_rate: Fraction of each branch dropped in train mode; 0 builds none.
      rotary: Whether attention turns queries and keys by their positions.
      use_bias: Whether linear layers and norms have a bias.
      branch_init: Draws the kernels that end a branch, `attention/out` and `down`.
      rngs: Source of the initial values and of the dropout masks.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        *,
        rotary: bool,
        use_bias: bool,
        branch_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = nnx.LayerNorm(embed_dim, use_bias=use_bias, rngs=rngs)
        self.attention = Attention(
            embed_dim,
            num_heads,
            rotary=rotary,
            use_bias=use_bias,
            kernel_init=_DRAW,
            out_init=branch_init,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(embed_dim, use_bias=use_bias, rngs=rngs)
        self.up = nnx.Linear(
            embed_dim, mlp_dim, use_bias=use_bias, kernel_init=_DRAW, rngs=rngs
        )
        self.down = nnx.Linear(
            mlp_dim, embed_dim, use_bias=use_bias, kernel_init=branch_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(self, hidden: Float[Array, "b t i"]) -> Float[Array, "b t i"]:
        """Returns the tokens of the next block."""
        branch = self.attention(self.attention_norm(hidden), is_causal=True)
        return self._perceptron(hidden + self.dropout(branch))

    def decode(
        self, hidden: Float[Array, "b t i"], memory: Memory, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b t i"], Memory]:
        """As a call, for new tokens from this position on, after those in memory."""
        normal = self.attention_norm(hidden)
        branch, memory = self.attention.decode(normal, memory, position)
        return self._perceptron(hidden + self.dropout(branch)), memory

    def _perceptron(self, hidden: Float[Array, "b t i"]) -> Float[Array, "b t i"]:
        branch = self.down(nnx.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + self.dropout(branch)


class Transformer(nnx.Module):
    """`embedding`, positions, `blocks/0`, `blocks/1`, ..., `norm`, and the head.

    Scanned, the blocks are one, `blocks`, whose arrays have a leading layer axis: the
    same numbers from the same seed, compiled once instead of `depth` times.

    `train()` and `eval()` switch dropout on and off; a new model is in train mode.

    Args:
      vocab_size: Number of tokens there are, and of logits.
      context: Most tokens of a row.
      depth: Number of blocks.
      embed_dim: Features of each token.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Hidden features of each block's perceptron.
      dropout_rate: Fraction dropped in train mode, of the embedded tokens and of both
        branches of each block; 0 builds no dropout.
      positions: "learned" (added to the embedding) or "rotary" (in attention).
      tied: Whether the head is the embedding's transpose, else a layer `head`.
      use_bias: Whether linear layers and norms have a bias.
      scan: Whether the blocks are stacked and scanned over.
      rngs: Source of the initial values and of the dropout masks.

    Raises:
      ValueError: Sizes out of bounds, or that do not fit to each other.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        *,
        depth: int,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        positions: str,
        tied: bool,
        use_bias: bool,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        sizes = {
            "depth": depth,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "dropout_rate": dropout_rate,
        }
        _check(vocab_size, context, positions, sizes)
        rotary = positions == "rotary"
        self.context = context
        self.depth = depth
        self.embedding = nnx.Embed(
            vocab_size, embed_dim, embedding_init=_DRAW, rngs=rngs
        )
        self.position_embedding = (
            None if rotary else nnx.Param(_DRAW(rngs.params(), (context, embed_dim)))
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        # Two branches a block are added up: their sum starts with the size of one.
        branch_init = nnx.initializers.normal(0.02 / (2 * depth) ** 0.5)
        blocks = [
            Block(
                embed_dim,
                num_heads,
                mlp_dim,
                dropout_rate,
                rotary=rotary,
                use_bias=use_bias,
                branch_init=branch_init,
                rngs=rngs,
            )
            for _ in range(depth)
        ]
        self.blocks = _stacked(blocks) if scan else nnx.List(blocks)
        self.norm = nnx.LayerNorm(embed_dim, use_bias=use_bias, rngs=rngs)
        self.head = (
            None
            if tied
            else nnx.Linear(
                embed_dim, vocab_size, use_bias=False, kernel_init=_DRAW, rngs=rngs
            )
        )

    def __call__(self, tokens: Int[Array, "b t"]) -> Float32[Array, "b t o"]:
        """Returns for each token the logits of the next one.

        Raises:
          ValueError: More tokens than `context`.
        """
        hidden, _ = self._through_blocks(
            lambda block, hidden: (block(hidden), None), self._embed(tokens, 0)
        )
        return self._logits(hidden)

    def init_cache(self, batch: int) -> Cache:
        """Makes the cache of so many rows without a token."""
        block = self.blocks if self.scanned else self.blocks[0]
        heads, features = block.attention.num_heads, self.embedding.features
        memory = empty_memory(
            batch, self.context, heads, features // heads, self.embedding.dtype
        )
        layers = (memory,) * self.depth
        if self.scanned:
            layers = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
        return Cache(layers, jnp.int32(0))

    def decode(
        self, tokens: Int[Array, "b t"], cache: Cache
    ) -> tuple[Float32[Array, "b t o"], Cache]:
        """Returns the logits after new tokens, and the cache with these tokens in it.

        Their number is free: a prompt at once, then one at a time. The rows of a batch
        have equally many. Past `context` all logits are NaN.

        Args:
          tokens: The new tokens, which follow those in the cache.
          cache: Of the tokens before them.

        Raises:
          ValueError: More new tokens than `context`.
        """
        position = cache.position
        hidden, memory = self._through_blocks(
            lambda block, hidden, memory: block.decode(hidden, memory, position),
            self._embed(tokens, position),
            cache.memory,
        )
        position = position + tokens.shape[1]
        outputs = invalid_past(self.context, position, self._logits(hidden))
        return outputs, Cache(memory, position)

    @property
    def scanned(self) -> bool:
        """Whether the blocks are stacked."""
        return isinstance(self.blocks, Block)

    def _embed(
        self, tokens: Int[Array, "b t"], position: int | Int[Array, ""]
    ) -> Float[Array, "b t i"]:
        length = tokens.shape[1]
        check_length("transformer", "context", self.context, length)
        hidden = self.embedding(tokens)
        if self.position_embedding is not None:
            added = jax.lax.dynamic_slice_in_dim(
                self.position_embedding[...], position, length
            )
            hidden = hidden + added[None]
        return self.dropout(hidden)

    def _through_blocks(
        self,
        step: Callable[..., tuple[Float[Array, "b t i"], Any]],
        hidden: Float[Array, "b t i"],
        *per_layer: Any,
    ) -> tuple[Float[Array, "b t i"], Any]:
        """Runs `step(block, hidden, *of_this_layer)` block after block."""
        if self.scanned:
            return self._scan(step, hidden, per_layer)
        outputs = []
        for block, *of_this_layer in zip(self.blocks, *per_layer, strict=True):
            hidden, output = step(block, hidden, *of_this_layer)
            outputs.append(output)
        return hidden, tuple(outputs)

    def _scan(
        self,
        step: Callable[..., tuple[Float[Array, "b t i"], Any]],
        hidden: Float[Array, "b t i"],
        per_layer: tuple[Any, ...],
    ) -> tuple[Float[Array, "b t i"], Any]:
        """As `_through_blocks`, in one loop over the layer axis.

        Unlike `nnx.scan` it takes a model that a traced function closes over.
        """
        graphdef, streams, arrays = nnx.split(self.blocks, nnx.RngState, ...)

        def body(hidden: Float[Array, "b t i"], of_this_layer: Any) -> Any:
            streams, arrays, rest = of_this_layer
            block = nnx.merge(graphdef, streams, arrays, copy=True)
            hidden, output = step(block, hidden, *rest)
            return hidden, (output, nnx.state(block, nnx.RngState))

        layers = (streams, arrays, per_layer)
        hidden, (outputs, streams) = jax.lax.scan(body, hidden, layers)
        if not self.blocks.dropout.deterministic:  # dropout drew from them
            nnx.update(self.blocks, streams)
        return hidden, outputs

    def _logits(self, hidden: Float[Array, "b t i"]) -> Float32[Array, "b t o"]:
        return logits(self.norm(hidden), self.embedding, self.head)


def _check(
    vocab_size: int, context: int, positions: str, sizes: dict[str, Any]
) -> None:
    problems = size_problems("transformer", vocab_size=vocab_size, context=context)
    problems += block_problems("transformer", **sizes)
    if positions not in POSITIONS:
        problems.append(
            f"transformer: positions must be one of {POSITIONS}, got {positions!r}."
            " Choose one of them."
        )
    embed_dim, num_heads = sizes["embed_dim"], sizes["num_heads"]
    if positions == "rotary" and num_heads >= 1 and embed_dim // num_heads % 2:
        problems.append(
            "transformer: rotary positions must have heads of an even size, got"
            f" embed_dim {embed_dim} / num_heads {num_heads}. Change one of the two."
        )
    raise_all(problems)


def _stacked(blocks: Sequence[Block]) -> Block:
    """One block whose arrays, random streams included, have a leading layer axis."""
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))


def build(
    *,
    vocab_size: int,
    context: int,
    rngs: nnx.Rngs,
    depth: int = 4,
    embed_dim: int = 128,
    num_heads: int = 4,
    mlp_dim: int = 512,
    dropout_rate: float = 0.0,
    positions: str = "learned",
    tied: bool = True,
    use_bias: bool = False,
    scan: bool = False,
) -> Transformer:
    """Builds a `Transformer` for `vocab_size` tokens, `context` of them in a row."""
    return Transformer(
        vocab_size,
        context,
        depth=depth,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        dropout_rate=dropout_rate,
        positions=positions,
        tied=tied,
        use_bias=use_bias,
        scan=scan,
        rngs=rngs,
    )
