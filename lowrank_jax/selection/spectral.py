"""Rules that read a rank off each layer's own spectrum, without a budget."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, lowest
from lowrank_jax.selection import tails
from lowrank_jax.selection.tails import Importances, Tail


def by_energy(
    importances: Mapping[str, Float[np.ndarray, "*stack r"]], energy: float
) -> dict[str, Any]:
    """Returns the least prefix of each layer with this share of squared importances.

    Args:
      importances: Importance of each column, in the order in which it would be kept.
      energy: Share to keep, in (0, 1]; a share that is met exactly is met, and all of
        it are all columns up to the last that has any.

    Raises:
      UserError: The share is out of bounds, or an importance is not finite.

    >>> by_energy({"a": np.array([4.0, 3.0, 2.0, 1.0])}, 0.9)
    {'a': 3}
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy: must be in (0, 1], got {energy}. Give a share of it.")
    return _least_prefix(importances, tails.energy, energy)


def by_entropy(importances: Mapping[str, Importances], share: float) -> dict[str, Any]:
    """Returns the least prefix of each layer with this share of its entropy.

    `p_i = s_i / sum s`, and the least k with
    `-sum_{i<=k} p_i log p_i >= share * -sum_i p_i log p_i` (ARSVD, arXiv 2504.20078,
    who take 0.8 to 0.95).

    Args:
      importances: Importance of each column, in the order in which it would be kept.
      share: Share to keep, in (0, 1]; met exactly, it is met.

    Raises:
      UserError: The share is out of bounds, or an importance is not finite.

    >>> by_entropy({"a": np.array([4.0, 3.0, 2.0, 1.0])}, 0.5)
    {'a': 2}
    """
    if not 0 < share <= 1:
        raise UserError(f"entropy: must be in (0, 1], got {share}. Give a share of it.")
    return _least_prefix(importances, tails.entropy, share)


def by_threshold(
    importances: Mapping[str, Importances], threshold: float
) -> dict[str, Any]:
    """Returns the least prefix of each layer past which no column has this share of the
    largest importance there.

    Args:
      importances: Importance of each column, in the order in which it would be kept.
      threshold: In [0, 1]; what is at it stays, and at 0 all that is not 0.

    Raises:
      UserError: The threshold is out of bounds, or an importance is not finite.

    >>> by_threshold({"a": np.array([4.0, 3.0, 2.0, 1.0])}, 0.5)
    {'a': 3}
    """
    if not 0 <= threshold <= 1:
        raise UserError(
            f"threshold: must be in [0, 1], got {threshold}. Give a share of the"
            " largest value."
        )
    tails.check_finite(importances)
    ranks = {}
    for path, columns in importances.items():
        largest = tails.operator_norm(columns)[..., :-1]  # of what follows a prefix
        stays = (largest >= threshold * (1 - 1e-12)) & (largest > 0)
        ranks[path] = stays.sum(axis=-1).tolist()
    return ranks


def by_noise(
    spectra: Mapping[str, Float[np.ndarray, "*stack n"]],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Returns how many singular values stand out of the noise: EVBMF.

    The global solution of empirical variational Bayesian matrix factorization, with the
    noise estimated too (Nakajima et al., JMLR 2013, theorem 2); 1 at least. A product
    of so low a rank that no singular value is left for the noise, below about
    `L / (1 + L / M)` for a matrix of L <= M sides, keeps all it has.

    Args:
      spectra: Singular values of each matrix, falling.
      sizes: Rows and columns of the matrices of each layer.

    Raises:
      UserError: A value is not finite.
    """
    tails.check_finite(spectra)

    def ranks(path: str) -> Any:
        rows = tails.rows_of(spectra[path])
        counts = [_above_noise(row, *sorted(sizes[path])) for row in rows]
        return np.reshape(counts, spectra[path].shape[:-1]).astype(int).tolist()

    return {path: ranks(path) for path in spectra}


def noise_threshold(rows: int, columns: int, noise: float) -> float:
    """Returns the singular value above which EVBMF keeps a column, of a matrix with
    noise of this standard deviation.

    >>> round(noise_threshold(64, 576, 1.0), 6)
    34.624883
    """
    short, long = sorted((rows, columns))
    alpha = short / long
    bound = 2.5129 * math.sqrt(alpha)
    return noise * math.sqrt(long * (1 + bound) * (1 + alpha / bound))


def _above_noise(spectrum: Float[np.ndarray, " n"], short: int, long: int) -> int:
    """EVBMF's rank of one matrix whose sides are `short` and `long`."""
    values = spectrum[spectrum > 0].astype(np.float64)
    if not len(values):
        return min(len(spectrum), 1)
    # On the scale of the largest, so that no square leaves the range of floats.
    squares = np.square(values / values[0])
    alpha = short / long
    edge = noise_threshold(short, long, 1.0) ** 2 / long

    def objective(variance: float) -> float:
        x = squares / (long * variance)
        large = x[x > edge]
        gap = large - (1 + alpha)
        tau = (gap + np.sqrt(np.square(gap) - 4 * alpha)) / 2
        return (
            np.sum(x[x <= edge] - np.log(x[x <= edge]))
            + np.sum(large - tau + np.log((tau + 1) / large))
            + alpha * np.sum(np.log(tau / alpha + 1))
            + (short - len(squares)) * np.log(variance)
        )

    split = min(int(np.ceil(short / (1 + alpha))) - 1, len(squares))
    noise = squares[split:]
    high = squares.sum() / (short * long)
    low = max(noise[0] / (long * edge), noise.mean() / long) if len(noise) else 0.0
    low = max(low, 1e-12 * high)
    for _ in range(4):  # finer and finer around the best of a grid
        grid = np.geomspace(low, max(high, low), 200)
        best = int(np.argmin([objective(variance) for variance in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    variance = grid[best]
    return max(int(np.sum(squares > long * variance * edge)), 1)


def by_scale(
    measured: Mapping[str, Float[np.ndarray, "*stack"]],
    scale: float,
    full_ranks: Ranks,
) -> dict[str, Any]:
    """Returns a multiple of a measured rank, stable or effective, rounded up, 1 at
    least where the layer's own is.

    Args:
      measured: Of each layer.
      scale: What to multiply it by, above 0.
      full_ranks: Ranks that are not exceeded.

    Raises:
      UserError: The scale is not positive, or a value is not finite.

    >>> by_scale({"a": np.array(1.875)}, 2, {"a": 10})
    {'a': 4}
    """
    if not 0 < scale < np.inf:
        raise UserError(f"scale: must be positive, got {scale}. Give a number above 0.")
    tails.check_finite(measured)
    return {
        path: lowest(
            np.maximum(np.ceil(scale * value - 1e-6), 1).clip(max=2**31).astype(int),
            full_ranks[path],
        )
        for path, value in measured.items()
    }


def scaled_stable_ranks(
    stable_ranks: Mapping[str, Float[np.ndarray, "*stack"]],
    initial: Mapping[str, Float[np.ndarray, "*stack"]],
    full_ranks: Mapping[str, int],
) -> dict[str, Any]:
    """Scales stable ranks so that they are full at the start: Cuttlefish's rule.

    `r = min(R, ceil(xi * sr))` with `xi = R / sr(init)` (Wang et al., 2023).

    Args:
      stable_ranks: Of each layer now.
      initial: Of each layer when it was initialised.
      full_ranks: R of each layer.

    >>> scaled_stable_ranks({"a": np.array(2.0)}, {"a": np.array(4.0)}, {"a": 10})
    {'a': 5}
    """
    ranks = {}
    for path, now in stable_ranks.items():
        full = full_ranks[path]
        first = np.asarray(initial[path], np.float64)
        positive = first > 0  # a layer that started at zero has no scale: full rank
        scaled = np.asarray(now, np.float64) * full / np.where(positive, first, 1)
        scaled = np.where(positive, scaled, full)
        ranks[path] = np.clip(np.ceil(scaled - 1e-6), 1, full).astype(int).tolist()
    return ranks


def stands_still(
    history: Float[np.ndarray, "t n"],
    *,
    window: int = 15,
    points: int = 11,
    tolerance: float = 0.1,
) -> bool:
    """Tells whether the moving average of every series is flat, as Cuttlefish does.

    Exponential moving averages with weight 2 / (window + 1); flat is a mean absolute
    gradient of at most the tolerance over the last points (Wang et al., 2023, their
    code).

    Args:
      history: One row for each measurement, one column for each layer.
      window: Of the moving average.
      points: How many of the last averages to look at; fewer measurements are no
        answer.
      tolerance: Change between two measurements that counts as standing still.
    """
    if len(history) < points:
        return False
    alpha, averages = 2 / (window + 1), [history[0]]
    for row in history[1:]:
        averages.append(alpha * row + (1 - alpha) * averages[-1])
    slopes = np.gradient(np.stack(averages[-points:]), axis=0)
    return bool((np.abs(slopes).mean(axis=0) <= tolerance).all())


def _least_prefix(
    importances: Mapping[str, Importances],
    curve: Callable[[Importances], Tail],
    share: float,
) -> dict[str, Any]:
    """The least prefix of each layer that keeps a share of what a curve measures; 0
    where there is nothing."""
    tails.check_finite(importances)
    # Sums are in floats: 1e-12 of the share may be missing, but not of all of it.
    allowed = 0.0 if share == 1 else 1 - share * (1 - 1e-12)
    ranks = {}
    for path, importance in importances.items():
        # The prefix of length n is short of the share for n = 1 .. rank - 1.
        short = (curve(importance)[..., 1:] > allowed).sum(axis=-1)
        ranks[path] = np.where((importance != 0).any(axis=-1), short + 1, 0).tolist()
    return ranks
