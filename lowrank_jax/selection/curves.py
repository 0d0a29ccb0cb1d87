"""What each rank of each layer keeps: curves from factors, as plain numbers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import linalg, placement
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.ranks import Ranks, flatten_rank, name_of


def column_importances(
    factors: Mapping[str, Factors],
) -> dict[str, Float[np.ndarray, "*stack r"]]:
    """Returns `||u_b|| ||v_b||` of each column, `|s_b|` included where there is one.

    Columns at or past the active rank have none: 0.

    Raises:
      UserError: Factors with one rank per example.
    """
    check_common(factors)
    found = {}
    for path, layer in factors.items():
        left, right = _scaled_norms(*nnx.split(layer))
        found[path] = _norms(*left) * _norms(*right)
    return found


def singular_values(
    factors: Mapping[str, Factors],
) -> dict[str, Float[np.ndarray, "*stack n"]]:
    """Returns the singular values of each product at its active rank, falling.

    Raises:
      UserError: Factors with one rank per example.
    """
    check_common(factors)
    return {
        path: placement.to_host(
            linalg.singular_values(layer.active_u(None), None, layer.active_v(None))
        )
        for path, layer in factors.items()
    }


def stable_ranks(
    matrices: Mapping[str, Float[Array, "*stack i o"]],
) -> dict[str, Float[np.ndarray, "*stack"]]:
    """Returns `||W||_F^2 / ||W||_2^2` of each matrix; 0 for W = 0."""
    ranks = {}
    for path, matrix in matrices.items():
        wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        spectrum = jnp.linalg.svd(placement.whole(wide), compute_uv=False)
        ranks[path] = linalg.stable_rank(placement.to_host(spectrum))
    return ranks


def losses(
    score: Callable[[Sequence[Ranks]], list[float]], ranks: Ranks, *, levels: int = 8
) -> dict[str, list[Float[np.ndarray, " n"]]]:
    """Measures what the score loses when one matrix alone is cut.

    For models trained with ordered dropout it is the importance of each prefix. A rank
    that loses less than a higher one counts as that one, and none loses less than
    nothing; between the ranks that are scored the loss is on a line.

    Args:
      score: Scores of rank vectors, higher is better, NaN worst; called once.
      ranks: Active ranks.
      levels: How many ranks of a matrix are scored, evenly spaced from 0 up, beside its
        own.

    Returns:
      Of each layer, for each of its matrices, the loss at 0, 1, ... columns.
    """
    tried: list[Ranks] = [ranks]
    spaced: dict[str, list[Any]] = {}
    for path, rank in ranks.items():
        flat = flatten_rank(rank)
        spaced[path] = []
        for number, active in enumerate(flat):
            several = np.unique(np.arange(levels) * active // levels)
            spaced[path].append(several[several < active])
            for one in spaced[path][-1]:
                lowered = np.array([*flat[:number], one, *flat[number + 1 :]])
                cut = lowered.reshape(np.shape(rank)).tolist()
                tried.append({**ranks, path: cut})
    scores = np.array(score(tried), np.float64)
    worst = np.nanmin(scores, initial=0.0, where=np.isfinite(scores))
    whole, *lost = np.nan_to_num(scores, nan=worst, neginf=worst)
    taken = iter(lost)
    found: dict[str, list[Float[np.ndarray, " n"]]] = {}
    for path, rank in ranks.items():
        found[path] = []
        for active, several in zip(flatten_rank(rank), spaced[path], strict=True):
            values = [max(whole - next(taken), 0.0) for _ in several]
            found[path].append(falling(several, values, active))
    return found


def falling(
    levels: Sequence[int], values: Sequence[float] | np.ndarray, active: int
) -> Float[np.ndarray, " n"]:
    """Returns a curve from what is lost at some ranks, rising, below the active one.

    A rank that loses less than a higher one counts as that one, the active rank loses
    nothing, and between these ranks the loss is on a line.

    >>> falling([0, 2], [1.0, 0.5], 3).tolist()
    [1.0, 0.75, 0.5, 0.0]
    """
    highest = np.maximum.accumulate([0.0, *reversed(values)])[::-1]
    return np.interp(np.arange(active + 1), [*levels, active], highest)


def check_common(factors: Mapping[str, Factors]) -> None:
    """Raises UserError for factors with one rank per example."""
    if several := [path for path in factors if factors[path].per_example]:
        raise UserError(
            f"{', '.join(map(name_of, several))}: rank must be one number to read"
            " importances, got one per example. Set a rank with set_ranks first."
        )


@functools.partial(jax.jit, static_argnums=0)
def _scaled_norms(
    structure: nnx.GraphDef[Factors], state: nnx.State
) -> list[tuple[Array, Array]]:
    """The parts of the norms of the columns of u and the rows of v (`_norms`); one
    program, since step by step there would be several copies of the factors."""
    layer = nnx.merge(structure, state)
    sides = ((layer.active_u(None), -2), (layer.active_v(None), -1))
    found = []
    for matrix, axis in sides:
        wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True, initial=0)
        unit = wide / jnp.where(largest == 0, 1, largest)
        found.append((jnp.sum(jnp.square(unit), axis=axis), jnp.squeeze(largest, axis)))
    return found


def _norms(
    squares: Float[Array, "*stack r"], largest: Float[Array, "*stack r"]
) -> Float[np.ndarray, "*stack r"]:
    """Returns norms by the squares over the largest number, and that: squares alone
    would underflow in float32."""
    roots = np.sqrt(placement.to_host(squares).astype(np.float64))
    return roots * placement.to_host(largest).astype(np.float64)
