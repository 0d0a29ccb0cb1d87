"""Surgery: put low rank into a model, read and set its ranks, cut it, take it out
again.

Works on any Flax NNX model, without touching its code. A path is the `"/"`-joined NNX
path of a layer, the same in rules, logs, errors, rank files and checkpoints. Functions
that change the model's shape return a new model and leave the one they are given alone.
"""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowrank_jax.active import check_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.layers import LowRankLayer
from lowrank_jax.paths import find_factors, replace
from lowrank_jax.ranks import Ranks, unknown_paths


def merge(model: nnx.Module, paths: Collection[str] | None = None) -> nnx.Module:
    """A copy of the model with low-rank layers dense again, at their active rank.

    Args:
      model: A low-rank model.
      paths: Which factors, as in `find_factors`; None for all.

    Raises:
      ValueError: A path that is unknown.
    """
    factors = find_factors(model)
    if unknown := [path for path in paths or () if path not in factors]:
        raise UserError(unknown_paths(unknown, list(factors)))
    model = nnx.clone(model)
    chosen = {
        id(one)
        for path, one in find_factors(model).items()
        if paths is None or path in paths
    }
    kernels: dict[Any, nnx.Param] = {}

    def dense(node: Any) -> nnx.Module | None:
        if not isinstance(node, LowRankLayer) or id(node.factors) not in chosen:
            return None
        key = (id(node.factors), node.fold)
        if key not in kernels:
            kernels[key] = nnx.Param(node.merged_kernel())
        return node.to_dense(kernels[key])

    return replace(model, dense)


def truncate(model: nnx.Module, ranks: Ranks) -> nnx.Module:
    """A copy of the model cut to these ranks: smaller arrays, all of them active.

    Args:
      model: A low-rank model.
      ranks: Rank of each layer by path; layers that are not named keep theirs. A stack
        of layers with different ranks is allocated at the largest and masked below it.

    Raises:
      ValueError: An unknown path or a rank outside [0, allocated], all at once.
    """
    ranks = check_ranks(model, ranks)
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        if path in ranks:
            factors.cut(ranks[path])
    return model


def canonicalize(model: nnx.Module) -> nnx.Module:
    """A copy whose factors are the SVD of their product at the active rank.

    The singular values are in `s` where there is one, else shared equally; the square
    factors of a deeper product are multiplied back. The function stays, the columns
    come in order of their singular values, and every prefix is the best approximation
    of its rank (Eckart-Young). Not for models trained with ordered dropout: their own
    order is better for the loss.
    """
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        product = [x for x in factors.arrays() if x is not None]
        if not any(isinstance(x, jax.core.Tracer) for x in product) and not all(
            np.isfinite(x).all() for x in product
        ):
            raise UserError(
                f"{path}: factors must be finite to have an SVD, got NaN or infinity."
                " Train or load them anew, with a lower learning rate."
            )
        factors.canonicalize()
    return model
