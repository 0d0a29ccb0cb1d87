"""Vision transformer (Dosovitskiy et al., 2021), pre-norm, with mean pooling.

Letters: `b` batch, `x y` space, `c` channels, `t` tokens, `i` embedding, `o` classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from lowrank_jax.errors import raise_all
from train.models.sizes import block_problems, size_problems


class Block(nnx.Module):
    """Self-attention, then `down(gelu(up(...)))`, each normalized first and added.

    Dropout falls on the two branches and not on the attention weights, where it would
    rule out fused attention.

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
        self.attention_norm = nnx.LayerNorm(embed_dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, embed_dim, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(embed_dim, rngs=rngs)
        self.up = nnx.Linear(embed_dim, mlp_dim, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, embed_dim, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

    def __call__(self, tokens: Float[Array, "b t i"]) -> Float[Array, "b t i"]:
        """Returns the tokens of the next block."""
        branch = self.attention(self.attention_norm(tokens))
        tokens = tokens + (self.dropout(branch) if self.dropout else branch)
        branch = self.down(nnx.gelu(self.up(self.mlp_norm(tokens))))
        return tokens + (self.dropout(branch) if self.dropout else branch)


class ViT(nnx.Module):
    """`patch_embedding`, `blocks/0`, `blocks/1`, ..., `norm`, mean over tokens, `head`.

    `train()` and `eval()` switch dropout on and off; a new model is in train mode.

    Args:
      image_shape: Shape (x, y, c) of one image.
      num_classes: Number of logits.
      patch_size: Side of a patch; divides both sides of the image.
      embed_dim: Features of each token.
      depth: Number of blocks.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Hidden features of each block's perceptron.
      dropout_rate: Fraction dropped in train mode; 0 builds no dropout.
      rngs: Source of the initial values and of the dropout masks.

    Raises:
      ValueError: `patch_size` does not divide the image, or `num_heads` `embed_dim`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        x, y, channels = image_shape
        problems = size_problems("vit", patch_size=patch_size)
        if patch_size >= 1 and (x % patch_size or y % patch_size):
            problems.append(
                f"vit: patch_size must divide the image's {x}x{y} pixels, "
                f"got {patch_size}. Choose another patch_size or resize the images."
            )
        problems += block_problems(
            "vit",
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            dropout_rate=dropout_rate,
        )
        raise_all(problems)
        self.patch_embedding = nnx.Conv(
            channels,
            embed_dim,
            (patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            rngs=rngs,
        )
        num_tokens = (x // patch_size) * (y // patch_size)
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (num_tokens, embed_dim))
        )
        self.blocks = nnx.List(
            Block(embed_dim, num_heads, mlp_dim, dropout_rate, rngs=rngs)
            for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(embed_dim, rngs=rngs)
        self.head = nnx.Linear(embed_dim, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float32[Array, "b o"]:
        """Returns the logits of each image."""
        patches = self.patch_embedding(images)
        tokens = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        tokens = tokens + self.position_embedding[None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(axis=1)).astype(jnp.float32)


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    patch_size: int = 2,
    embed_dim: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    mlp_dim: int = 128,
    dropout_rate: float = 0.0,
) -> ViT:
    """Builds a `ViT` for images of shape `image_shape` (x, y, c)."""
    return ViT(
        image_shape,
        num_classes,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        dropout_rate=dropout_rate,
        rngs=rngs,
    )
