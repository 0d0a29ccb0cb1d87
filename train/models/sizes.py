"""The check of sizes that models are built with."""

from collections.abc import Sequence

from lowrank_jax.errors import raise_all

MOST_FEATURES = 2**20
"""Above it one matrix alone is larger than a machine, and XLA's sizes overflow."""

MOST_LAYERS = 1024


def check_sizes(
    model: str, most: int = MOST_FEATURES, **sizes: int | Sequence[int]
) -> None:
    """Raises UserError unless all of these sizes, by name, are in [1, most]."""
    problems = []
    for name, size in sizes.items():
        numbers = [size] if isinstance(size, int) else size
        if not all(1 <= number <= most for number in numbers):
            problems.append(
                f"{model}: {name} must be in [1, {most:,}], got {size}. Correct it."
            )
    raise_all(problems)
