"""The checks of sizes that models are built with and called with."""

from collections.abc import Sequence

from lowrank_jax.errors import UserError, raise_all

MOST_FEATURES = 2**20
"""Above it one matrix alone is larger than a machine, and XLA's sizes overflow."""

MOST_LAYERS = 1024


def check_sizes(
    model: str, most: int = MOST_FEATURES, **sizes: int | Sequence[int]
) -> None:
    """Raises UserError unless all of these sizes, by name, are in [1, most]."""
    raise_all(size_problems(model, most, **sizes))


def size_problems(
    model: str, most: int = MOST_FEATURES, **sizes: int | Sequence[int]
) -> list[str]:
    """Lists which of these sizes, by name, are not in [1, most]."""
    problems = []
    for name, size in sizes.items():
        numbers = [size] if isinstance(size, int) else size
        if not all(1 <= number <= most for number in numbers):
            problems.append(
                f"{model}: {name} must be in [1, {most:,}], got {size}. Correct it."
            )
    return problems


def block_problems(
    model: str,
    *,
    depth: int,
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    dropout_rate: float,
) -> list[str]:
    """Lists what is wrong with the sizes of a transformer's blocks."""
    problems = size_problems(
        model, embed_dim=embed_dim, num_heads=num_heads, mlp_dim=mlp_dim
    )
    problems += size_problems(model, MOST_LAYERS, depth=depth)
    if not 0 <= dropout_rate < 1:
        problems.append(
            f"{model}: dropout_rate must be in [0, 1), got {dropout_rate}. Lower it."
        )
    if num_heads >= 1 and embed_dim % num_heads:
        problems.append(
            f"{model}: num_heads must divide embed_dim {embed_dim}, got {num_heads}. "
            "Change one of the two."
        )
    return problems


def check_length(model: str, name: str, most: int, tokens: int) -> None:
    """Raises UserError where rows have more tokens than the size of this name says."""
    if tokens > most:
        raise UserError(
            f"{model}: rows must have at most {name} = {most} tokens, got {tokens}."
            f" Cut them, or build the model with a larger {name}."
        )
