"""Shrinking: cut a training state, parameters, optimizer state and ranks together.

Cutting a prefix continues the masked run exactly for optimizers that treat every number
on its own (SGD with momentum, Adam and kin, clipping by value): their moments are
sliced with the parameters (`optimizer_state`). The state of any other optimizer
(Adafactor's factored moments, Muon) starts anew, and is named. LARS and LAMB keep
Adam's or SGD's moments, which are sliced, but scale updates by norms of whole weights,
so that their shrunk run leaves the masked one. So do, without a state that could name
them, `optax.adaptive_grad_clip`, `clip_by_block_rms`, `centralize` and Fromage: the
norm or mean of a weight is another one without its tail.
"""

import functools
import math
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from lowrank_jax import linalg, placement
from lowrank_jax.active import check_ranks
from lowrank_jax.errors import raise_all
from lowrank_jax.optimizer_state import Cut, cut_opt_state
from lowrank_jax.paths import Model, find_factors
from lowrank_jax.ranks import (
    Ranks,
    RankValue,
    flatten_rank,
    largest,
    lowest,
    name_of,
)
from lowrank_jax.surgery import truncate


class Shrunk(NamedTuple, Generic[Model]):
    """What `shrink` returns.

    Args:
      model: The cut model.
      opt_state: The optimizer state that goes with it, or the `nnx.Optimizer`.
      restarted: Types of the optimizer's parts that were started anew.
    """

    model: Model
    opt_state: Any
    restarted: list[str]


def shrink(
    model: Model,
    ranks: Ranks,
    opt_state: optax.OptState | nnx.Optimizer,
    optimizer: optax.GradientTransformation | None = None,
) -> Shrunk[Model]:
    """Cuts a model and its optimizer state to these ranks.

    Arrays of both stay split over a mesh as they are, where the new sizes divide.

    Args:
      model: A low-rank model.
      ranks: Rank of each layer by path, up to the active one; layers that are not named
        keep theirs.
      opt_state: State of `optimizer` for `nnx.state(model, nnx.Param)` (or its
        `nnx.as_pure` form); or an `nnx.Optimizer`, which brings its own `optimizer`;
        where something is cut, a new one comes back.
      optimizer: The optimizer, to start anew what cannot be cut.

    Raises:
      UserError: An unknown path, or a rank outside [0, active].

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> small, optimizer, restarted = shrink(model, {"": 2}, optimizer)
    >>> optimizer.opt_state[0].mu["factors"]["u"].shape, restarted
    ((8, 2), [])
    """
    ranks = check_ranks(model, ranks)
    factors = find_factors(model)
    lowest_ranks = {p: min(flatten_rank(rank), default=0) for p, rank in ranks.items()}
    if all(rank == factors[path].max_rank for path, rank in lowest_ranks.items()):
        return Shrunk(nnx.clone(model), opt_state, [])
    small = truncate(model, ranks)
    if isinstance(opt_state, nnx.Optimizer):
        return Shrunk(small, *_shrink_optimizer(model, small, opt_state))
    return Shrunk(small, *carry_opt_state(model, small, opt_state, optimizer))


def carry_opt_state(
    model: nnx.Module,
    small: nnx.Module,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> tuple[optax.OptState, list[str]]:
    """Cuts an optimizer state to a model that was cut already.

    Args:
      model: The model before the cut.
      small: The model after it.
      opt_state: State of `optimizer` before it.
      optimizer: The optimizer.
      wrt: Which variables it trains.

    Returns:
      The cut state, and the types of the optimizer's parts that were started anew.
    """

    def params_of(model: nnx.Module) -> Any:
        params = nnx.state(model, wrt)
        return params if _holds_variables(opt_state) else nnx.as_pure(params)

    after = params_of(small)
    acting = params_of(_acting(small))
    paths = jax.tree.leaves_with_path(params_of(model))
    trees = zip(paths, *map(jax.tree.leaves, (after, acting)), strict=True)
    cuts = {
        jax.tree_util.keystr(path): Cut(
            jnp.shape(old), jnp.shape(new), mask if jnp.ndim(mask) else None
        )
        for (path, old), new, mask in trees
    }
    return cut_opt_state(opt_state, optimizer.init(after), cuts)


def _shrink_optimizer(
    model: nnx.Module, small: nnx.Module, optimizer: nnx.Optimizer
) -> tuple[nnx.Optimizer, list[str]]:
    new = nnx.Optimizer(small, optimizer.tx, wrt=optimizer.wrt)
    state, restarted = carry_opt_state(
        model, small, nnx.as_pure(optimizer.opt_state), optimizer.tx, wrt=optimizer.wrt
    )
    variables = jax.tree.leaves(new.opt_state, is_leaf=_is_variable)
    for variable, value in zip(variables, jax.tree.leaves(state), strict=True):
        variable.set_value(value)
    new.step.set_value(optimizer.step[...])
    return new, restarted


def _acting(model: nnx.Module) -> nnx.Module:
    """A copy with masks in place of parameters: false where a cut left zeros.

    These are the columns past a matrix's rank in a stack of different ranks. A column
    that is only masked has numbers still, and moments of its own.
    """
    marked = nnx.clone(model)
    for _, variable in nnx.iter_graph(marked):
        if isinstance(variable, nnx.Variable):
            variable.set_value(np.True_)
    pairs = zip(*(find_factors(m).values() for m in (model, marked)), strict=True)
    for factors, marks in pairs:
        rank = factors.limits().active
        if min(flatten_rank(rank), default=0) == largest(rank):
            continue
        for name, mask in factors.rank_masks().items():
            getattr(marks, name).set_value(mask | (getattr(factors, name)[...] != 0))
    return marked


def tail_ranks(
    model: nnx.Module, *, threshold: float, multiple: int = 1
) -> dict[str, RankValue]:
    """Finds ranks to shrink to by Maestro's rule (Horvath et al., 2024, section 3.3).

    Keeps column b while the importance of the tail from it on, `||U_{>=b}||_F
    ||V_{>=b}||_F`, is at least the threshold; what is kept is always a prefix. Only
    active columns are read, so no rank rises.

    Args:
      model: A low-rank model.
      threshold: The papers' epsilon (their code has 1e-5).
      multiple: Round ranks up to a multiple of this (at most the active one), so that
        a run has a few shapes only.

    Raises:
      UserError: There are NaN among the active columns; all such layers are named.
    """
    ranks, problems = {}, []
    importances = _tail_importances(*nnx.split(model))
    for path, factors in find_factors(model).items():
        active = np.asarray(factors.limits().active)
        tails = placement.to_host(importances[path])
        if np.isnan(tails).any():
            problems.append(
                f"{name_of(path)}: factors must be numbers to be shrunk, got NaN. Lower"
                " the learning rate, or go on from an earlier checkpoint."
            )
        kept = (tails >= threshold).sum(axis=-1)
        rounded = -(-kept // multiple) * multiple
        ranks[path] = lowest(rounded, active)
    raise_all(problems)
    return ranks


def share_cut(model: nnx.Module, ranks: Ranks) -> float:
    """Returns what share of a model's parameters a cut to these ranks takes away.

    Args:
      model: A low-rank model.
      ranks: As of `shrink`.

    >>> from lowrank_jax import factorize
    >>> dense = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    >>> share_cut(factorize(dense), {"": 2})
    0.75
    """
    small = nnx.eval_shape(lambda model: truncate(model, ranks), model)
    before, after = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(m, nnx.Param)))
        for m in (model, small)
    )
    return 1 - after / before


@functools.partial(jax.jit, static_argnums=0)
def _tail_importances(graph: nnx.GraphDef, state: Any) -> dict[str, Array]:
    """Of each layer's tails, by path; compiled once for all layers of some shapes."""
    importances = {}
    for path, factors in find_factors(nnx.merge(graph, state)).items():
        left, right = linalg.column_norms(
            factors.active_u(None), None, factors.active_v(None)
        )
        right = jnp.where(factors.mask(), right, 0)
        importances[path] = linalg.tail_norms(left) * linalg.tail_norms(right)
    return importances


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _holds_variables(opt_state: optax.OptState) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_variable)
    return any(_is_variable(node) for node in nodes)
