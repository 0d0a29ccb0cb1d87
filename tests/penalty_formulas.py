"""Each penalty's formula for one matrix `u, s, v`, in float64 NumPy."""

import numpy as np
from spectra import columns, product, spectrum

C = 0.7
"""The constant of the funnel and of the log-determinant at step 0."""


def numpy_hierarchical(u, s, v) -> float:
    """The double sum of eq. 7 as it stands."""
    left = u if s is None else u * np.abs(s)
    return sum(
        np.linalg.norm(side[:, first:])
        for side in (left, v.T)
        for first in range(side.shape[1])
    )


def numpy_group(u, s, v) -> float:
    return sum(np.linalg.norm(column) for column in columns(u, s, v))


def numpy_orthogonality(u, s, v) -> float:
    """By the singular values of the factors: those of the Gram matrix less 1."""
    return sum(
        np.sum(np.square(np.square(np.linalg.svd(side, compute_uv=False)) - 1))
        / min(side.shape) ** 2
        for side in (u, v)
    )


def numpy_modified(u, s, v, target: int = 1, power: int = 2) -> float:
    values = spectrum(u, s, v) ** power
    return values[target:].sum() / values[:target].sum()


def numpy_nuclear(u, s, v) -> float:
    scales = np.ones(u.shape[1]) if s is None else np.abs(s)
    return sum(
        scale * (np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2) / 2
        for scale, a, b in zip(scales, u.T, v, strict=True)
    )


def sizes(u, s, v) -> np.ndarray:
    """Norm of u's column times that of v's row, with `s` in `u`."""
    left = u if s is None else u * s
    return np.linalg.norm(left, axis=0) * np.linalg.norm(v, axis=1)


def numpy_funnel(u, s, v, c: float = C) -> float:
    scales = sizes(u, None, v) if s is None else np.abs(s)
    return float(np.sum(1 - c / (scales + c)))


def numpy_log_determinant(u, s, v, c: float = C) -> float:
    return 0.5 * np.sum(np.log(spectrum(u, s, v) ** 2 + c))


def numpy_surrogate(u, s, v, c: float = C) -> float:
    """`<W, P W> / 2` at the matrix that P was made from."""
    matrix = product(u, s, v)
    inverse = np.linalg.inv(matrix @ matrix.T + c * np.eye(len(matrix)))
    return 0.5 * np.sum(matrix * (inverse @ matrix))
