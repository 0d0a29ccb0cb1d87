"""Examples of a linear map with chosen singular values."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def matrix(spectrum: Sequence[float], shape: tuple[int, int], seed: int) -> np.ndarray:
    """The map `(i, o)`: these singular values, random singular vectors."""
    rng = np.random.default_rng(seed)
    left, right = (
        np.linalg.qr(rng.normal(size=(size, size)))[0][:, : len(spectrum)]
        for size in shape
    )
    return (left * np.asarray(spectrum)) @ right.T


def linear_map(
    *, spectrum: Sequence[float], shape: tuple[int, int], examples: int, seed: int
) -> dict[str, Any]:
    """`y = x A` for normal inputs, a quarter of the examples for testing; the facts say
    the singular values."""
    inputs = np.random.default_rng(seed + 1).normal(size=(examples, shape[0]))
    arrays = {"x": inputs, "y": inputs @ matrix(spectrum, shape, seed)}
    first = examples // 4
    return {
        "train": {name: array[first:] for name, array in arrays.items()},
        "test": {name: array[:first] for name, array in arrays.items()},
        "facts": {"spectrum": list(spectrum)},
    }
