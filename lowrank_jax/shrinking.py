"""Shrinking: cut a training state, parameters, optimizer state and ranks together.

Cutting a prefix continues the masked run exactly for optimizers that treat every number
on its own (SGD with momentum, Adam and kin, clipping by value): their moments are
sliced with the parameters. The state of any other optimizer (Adafactor's factored
moments, Muon) starts anew, and is named. What belongs to which is decided by the type
of the state, never guessed from shapes. LARS and LAMB keep Adam's or SGD's moments,
which are sliced, but scale updates by norms of whole weights, so that their shrunk run
leaves the masked one.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from lowrank_jax import linalg
from lowrank_jax.cost import RankValue, flatten_rank
from lowrank_jax.surgery import (
    Ranks,
    check_ranks,
    find_factors,
    max_ranks,
    set_ranks,
    truncate,
)

ELEMENTWISE: tuple[type, ...] = (
    optax.TraceState,
    optax.ScaleByAdamState,
    optax.ScaleByAmsgradState,
    optax.ScaleByBeliefState,
    optax.ScaleByLionState,
    optax.ScaleByRmsState,
    optax.ScaleByRStdDevState,
    optax.ScaleByRssState,
    optax.ScaleByScheduleState,
    optax.EmaState,
    optax.MultiStepsState,
    optax.MaskedState,
    optax.PartitionState,
    optax.InjectStatefulHyperparamsState,
    optax.ApplyIfFiniteState,
    optax.contrib.ScheduleFreeState,
    # not exported by name; abstractly, since an array here would start the backend,
    # after which jax.distributed.initialize fails
    type(jax.eval_shape(lambda: optax.scale_by_rms(bias_correction=True).init({}))),
    type(jax.eval_shape(optax.schedules.WrappedSchedule(lambda count: 0.0).init)),
)
"""States whose arrays follow the parameters number by number, counters, and containers
of
such states."""


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


def cut_opt_state(
    opt_state: optax.OptState, fresh: optax.OptState
) -> tuple[optax.OptState, list[str]]:
    """Slices the state of an optimizer down to the shapes of a fresh one.

    Args:
      opt_state: State for the parameters before the cut of a prefix.
      fresh: State made anew for the parameters after it.

    Returns:
      The cut state, and the types of the parts that were taken from `fresh` instead.
    """
    restarted: list[str] = []
    return _cut(opt_state, fresh, restarted), restarted


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


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _holds_variables(opt_state: optax.OptState) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return any(isinstance(node, nnx.Variable) for node in nodes)


def _cut(old: Any, fresh: Any, restarted: list[str]) -> Any:
    if _is_state(old):
        if not jax.tree.leaves(old):
            return old
        if not isinstance(old, ELEMENTWISE):
            restarted.append(type(old).__name__)
            return fresh
        fields = zip(old, fresh, strict=True)
        return type(old)(*(_cut(a, b, restarted) for a, b in fields))
    nodes, structure = jax.tree.flatten(old, is_leaf=_is_state)
    new = jax.tree.leaves(fresh, is_leaf=_is_state)
    cut = [
        _cut(a, b, restarted) if _is_state(a) else _prefix(a, b)
        for a, b in zip(nodes, new, strict=True)
    ]
    return jax.tree.unflatten(structure, cut)


def _prefix(old: jax.Array, fresh: jax.Array) -> jax.Array:
    return old[tuple(slice(size) for size in jax.numpy.shape(fresh))]
