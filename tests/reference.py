"""Independent float64 NumPy references, shared by several test files."""

import itertools
from collections.abc import Sequence

import numpy as np


def relative_error(actual, expected) -> float:
    """`||actual - expected|| / ||expected||`, with 0 / 0 = 0; the shapes must agree."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = float(np.linalg.norm(actual - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0


def spectrum_error(matrix, rank: int) -> np.ndarray:
    """Frobenius distance of a stack of matrices to their nearest of a rank."""
    spectrum = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return np.sqrt(np.sum(np.square(spectrum[..., rank:]), axis=-1))


def convolve(
    images,
    kernel,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> np.ndarray:
    """A 2-D convolution `(b, x, y, c) -> (b, x, y, f)`, pixel by pixel."""
    images, kernel = np.asarray(images, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(images, [(0, 0), *padding, (0, 0)])
    sizes = [
        (padded.shape[1 + axis] - kernel.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    ]
    channels, filters = kernel.shape[2], kernel.shape[3] // groups
    result = np.zeros((len(images), *sizes, kernel.shape[3]))
    for x, y, group in itertools.product(*map(range, (*sizes, groups))):
        left, top = x * strides[0], y * strides[1]
        window = padded[
            :,
            left : left + kernel.shape[0],
            top : top + kernel.shape[1],
            group * channels : (group + 1) * channels,
        ]
        part = slice(group * filters, (group + 1) * filters)
        result[:, x, y, part] = np.tensordot(window, kernel[..., part], 3)
    return result
