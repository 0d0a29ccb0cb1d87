"""What is lost with the columns past a prefix: one falling curve for each matrix.

A curve has r + 1 values, at 0, 1, ..., r columns kept, and falls to 0 where all that
act are. Each is a reading of the importances of columns (the singular values, where the
factors are canonical), in the order in which they would be kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, flatten_rank, name_of

Importances: TypeAlias = Float[np.ndarray, "*stack r"]
Tail: TypeAlias = Float[np.ndarray, "*stack r+1"]
Errors: TypeAlias = Mapping[str, Sequence[Float[np.ndarray, " n"]]]
"""Of each layer, for each of its matrices, the error at 0, 1, ... columns, up to its
active rank."""


def energy(importances: Importances) -> Tail:
    """Returns the share of the squares that goes.

    The tails are summed from their own end, so that a small one keeps its value beside
    a large head, and only a tail of nothing is 0.
    """
    tails = squares(importances)
    total = tails[..., :1]
    return tails / np.where(total > 0, total, 1)


def squares(importances: Importances) -> Tail:
    """Returns the sum of the squares that go: the squared error in the matrix."""
    return _sums(np.square(np.asarray(importances, np.float64)))


def entropy(importances: Importances) -> Tail:
    """Returns the share of the entropy that goes, of p = s / sum s (ARSVD, 2025).

    A single value has no entropy; it goes with itself.
    """
    values = np.asarray(importances, np.float64)
    total = values.sum(axis=-1, keepdims=True)
    p = values / np.where(total > 0, total, 1)
    tails = _sums(-p * np.log(np.where(p > 0, p, 1)))
    whole = tails[..., :1]
    alone = whole <= 0
    tails = tails / np.where(alone, 1, whole)
    return np.where(alone, energy(importances), tails)


def operator_norm(importances: Importances) -> Tail:
    """Returns the largest value that goes, as a share of the largest of all.

    The relative error in operator norm (ALDS, Liebenwein et al., 2021).
    """
    largest = _largest(np.asarray(importances, np.float64))
    first = largest[..., :1]
    return largest / np.where(first > 0, first, 1)


def min_max(importances: Importances) -> Tail:
    """Returns the largest value that goes, on the scale from the least of the matrix,
    0, to its largest, 1 (WeLore, 2024).

    Where all are equal the scale is 1 throughout.
    """
    values = np.asarray(importances, np.float64)
    least = values.min(axis=-1, keepdims=True, initial=np.inf)
    span = values.max(axis=-1, keepdims=True, initial=0) - least
    scaled = np.where(span > 0, (values - least) / np.where(span > 0, span, 1), 1.0)
    return _largest(scaled)


TAILS: dict[str, Callable[[Importances], Tail]] = {
    "energy": energy,
    "squares": squares,
    "entropy": entropy,
    "operator_norm": operator_norm,
    "min_max": min_max,
}
"""The curves by name."""


def list_errors(
    importances: Mapping[str, Importances], ranks: Ranks, curve: str = "energy"
) -> Errors:
    """Reads one of `TAILS` for each matrix of each layer, over the columns that act.

    Args:
      importances: Of each column.
      ranks: Active ranks.
      curve: Which one.

    Raises:
      UserError: Another name, or importances that are not finite.
    """
    if curve not in TAILS:
        raise UserError(
            f"curve: must be one of {sorted(TAILS)}, got {curve!r}. Choose one."
        )
    check_finite(importances)
    tail = TAILS[curve]
    return {
        path: [
            tail(row[:active])
            for row, active in zip(
                rows_of(importances[path]), flatten_rank(rank), strict=True
            )
        ]
        for path, rank in ranks.items()
    }


def check_finite(importances: Mapping[str, Importances]) -> None:
    """Raises UserError at layers with NaN or infinity."""
    broken = [
        name_of(path)
        for path, columns in importances.items()
        if not np.isfinite(columns).all()
    ]
    if broken:
        raise UserError(
            f"{', '.join(broken)}: importances must be finite, got NaN or infinity."
            " Train or load the model anew."
        )


def rows_of(columns: Importances) -> Float[np.ndarray, "m r"]:
    """Lists the matrices of a stack."""
    return columns.reshape(math.prod(columns.shape[:-1]), columns.shape[-1])


def _sums(values: Importances) -> Tail:
    """Sums of what follows a prefix, from the end."""
    return _padded(np.cumsum(values[..., ::-1], axis=-1)[..., ::-1])


def _largest(values: Importances) -> Tail:
    """The largest of what follows a prefix."""
    return _padded(np.maximum.accumulate(values[..., ::-1], axis=-1)[..., ::-1])


def _padded(values: Importances) -> Tail:
    return np.concatenate([values, np.zeros((*values.shape[:-1], 1))], axis=-1)
