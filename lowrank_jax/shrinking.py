"""Shrinking: cut a training state, parameters, optimizer state and ranks together.

Cutting a prefix continues the masked run exactly for optimizers that treat every number
on its own (SGD with momentum, Adam and kin, clipping by value): their moments are
sliced with the parameters (`optimizer_state`). The state of any other optimizer
(Adafactor's factored moments, Muon) starts anew, and is named. LARS and LAMB keep
Adam's or SGD's moments, which are sliced, but scale updates by norms of whole weights,
so that their shrunk run leaves the masked one.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from lowrank_jax import linalg
from lowrank_jax.active import check_ranks, max_ranks, set_ranks
from lowrank_jax.optimizer_state import cut_opt_state
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Ranks, RankValue, flatten_rank
from lowrank_jax.surgery import truncate


class Shrunk(NamedTuple):
    """What `shrink` returns.

    Args:
      model: The cut model.
      opt_state: The optimizer state that goes with it.
      restarted: Types of the optimizer's parts that were started anew.
    """

    model: nnx.Module
    opt_state: Any
    restarted: list[str]


def shrink(
    model: nnx.Module,
    ranks: Ranks,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
) -> Shrunk:
    """Cuts a model and its optimizer state to these ranks.

    Args:
      model: A low-rank model.
      ranks: Rank of each layer by path; layers that are not named keep theirs.
      opt_state: State of `optimizer` for `nnx.state(model, nnx.Param)` (or its
        `nnx.as_pure` form).
      optimizer: The optimizer, to start anew what cannot be cut.

    Raises:
      ValueError: An unknown path or a rank out of bounds.
    """
    ranks = check_ranks(model, ranks)
    allocated = max_ranks(model)
    if all(_allocated(ranks[path]) == _allocated(allocated[path]) for path in ranks):
        small = nnx.clone(model)
        set_ranks(small, ranks)
        return Shrunk(small, opt_state, [])
    small = truncate(model, ranks)
    params = nnx.state(small, nnx.Param)
    if not _holds_variables(opt_state):
        params = nnx.as_pure(params)
    state, restarted = cut_opt_state(opt_state, optimizer.init(params))
    return Shrunk(small, state, restarted)


def tail_ranks(
    model: nnx.Module, *, threshold: float, multiple: int = 1
) -> dict[str, RankValue]:
    """The progressive-shrinking rule of Maestro (Horvath et al., 2024, section 3.3).

    Keeps column b while the importance of the tail from it on, `||U_{>=b}||_F
    ||V_{>=b}||_F`, is at least the threshold; what is kept is always a prefix.

    Args:
      model: A low-rank model.
      threshold: The papers' epsilon (their code has 1e-5).
      multiple: Round ranks up to a multiple of this (at most the allocated one), so
        that a run has a few shapes only.
    """
    ranks = {}
    for path, factors in find_factors(model).items():
        left, right = linalg.column_norms(*factors.arrays())
        tails = linalg.tail_norms(left) * linalg.tail_norms(right)
        kept = np.asarray(tails >= threshold).sum(axis=-1)
        rounded = -(-kept // multiple) * multiple
        ranks[path] = np.minimum(rounded, factors.max_rank).tolist()
    return ranks


def _allocated(rank: RankValue) -> int:
    return max(flatten_rank(rank), default=0)


def _holds_variables(opt_state: optax.OptState) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return any(isinstance(node, nnx.Variable) for node in nodes)
