"""Optimizer state through changes of the parameters' shapes.

Three things happen to a state when a model changes in the middle of a run:

- *cut*: a prefix of the rank axis stays. States that follow the parameters number by
  number are sliced with them, which continues the run exactly.
- *convert*: a dense kernel becomes factors. A momentum is a sum of gradients, and the
  gradient of a factor is linear in that of the kernel, so it goes over by the chain
  rule. Squares of gradients do not: such a part starts anew.
- *restart of schedules*: a new phase counts its learning-rate schedule from zero while
  the moments stay.

What can be done to which part is decided by the type of the state, never guessed from
shapes; a part that cannot follow starts anew and is named.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lowrank_jax import placement

# two states are not exported by name; abstractly, since an array here would start the
# backend, after which jax.distributed.initialize fails
_CORRECTED_RMS = type(
    jax.eval_shape(lambda: optax.scale_by_rms(bias_correction=True).init({}))
)
_INJECTED_SCHEDULE = type(
    jax.eval_shape(optax.schedules.WrappedSchedule(lambda count: 0.0).init)
)

ELEMENTWISE: tuple[Any, ...] = (
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
    _CORRECTED_RMS,
    _INJECTED_SCHEDULE,
)
"""States whose arrays follow the parameters number by number, counters, and containers
of such states."""

LINEAR: dict[type, str] = {
    optax.TraceState: "trace",
    optax.ScaleByLionState: "mu",
}
"""States that are a weighted sum of gradients, and the field that holds it."""

SCHEDULES: tuple[type, ...] = (optax.ScaleByScheduleState, _INJECTED_SCHEDULE)
"""Counters of learning-rate schedules."""


class Cut(NamedTuple):
    """What a cut does to one parameter.

    Args:
      before: Its shape before the cut.
      after: Its shape after it.
      acting: Which of its numbers act, where a stack was cut to different ranks; the
        moments of the others are those of a fresh state. None for all.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    acting: Bool[Array, "..."] | None = None


def cut_opt_state(
    opt_state: optax.OptState, fresh: optax.OptState, cuts: Mapping[str, Cut]
) -> tuple[optax.OptState, list[str]]:
    """Slices the state of an optimizer down to the shapes of a fresh one.

    A moment is sliced only where it stands under the path of a parameter and has the
    shape that this one had; what has another shape (`optax.flatten`) starts anew.

    Args:
      opt_state: State for the parameters before the cut of a prefix.
      fresh: State made anew for the parameters after it.
      cuts: What becomes of each parameter, by its path (`jax.tree_util.keystr`).

    Returns:
      The cut state, and the types of the parts that were taken from `fresh` instead.
    """

    def cut(old: Any, new: Any) -> Any | None:
        if not isinstance(old, ELEMENTWISE):
            return None
        fields = [
            _walk(a, b, cut, restarted) if _holds_state(a) else _cut_tree(a, b, cuts)
            for a, b in zip(old, new, strict=True)
        ]
        return None if any(x is _UNFIT for x in fields) else type(old)(*fields)

    restarted: list[str] = []
    return _walk(opt_state, fresh, cut, restarted), restarted


_UNFIT = object()


def _cut_tree(old: Any, fresh: Any, cuts: Mapping[str, Cut]) -> Any:
    """One field of a state: counters stay, moments are sliced; or `_UNFIT`."""
    leaves, structure = jax.tree.flatten_with_path(old)
    results = []
    for (path, moment), new in zip(leaves, jax.tree.leaves(fresh), strict=True):
        shape = jnp.shape(moment)
        cut = cuts.get(jax.tree_util.keystr(path))
        if cut is not None and (cut.before, cut.after) == (shape, jnp.shape(new)):
            sharding = placement.sharding_of(moment)
            moment = moment[tuple(slice(size) for size in cut.after)]
            if cut.acting is not None:
                moment = jnp.where(cut.acting, moment, new)
            moment = placement.kept(moment, sharding)
        elif shape != jnp.shape(new):
            return _UNFIT
        results.append(moment)
    return jax.tree.unflatten(structure, results)


def convert_opt_state(
    opt_state: optax.OptState,
    fresh: optax.OptState,
    to_old: Callable[[Any], Any],
    params: Any,
) -> tuple[optax.OptState, list[str]]:
    """Carries the state of an optimizer over to new parameters by the chain rule.

    With W = u v and a momentum m of W, the factors get m v^T and u^T m: what the
    momentum would be had the factors stood where they are all the time.

    Args:
      opt_state: State for the old parameters.
      fresh: State made anew for the new ones.
      to_old: Differentiable function from the new parameters to the old ones, such as
        merging.
      params: The new parameters.

    Returns:
      The converted state, and the types of the parts that were taken from `fresh`.
    """
    old_params, pull_back = jax.vjp(to_old, params)
    structure: Any = jax.tree.structure(old_params)

    def convert(old: Any, new: Any) -> Any | None:
        if isinstance(old, SCHEDULES):
            return old
        if type(old) not in LINEAR:
            return None
        field = LINEAR[type(old)]
        momentum = getattr(old, field)
        if structure != jax.tree.structure(momentum):
            return None  # masked: some parts are missing
        pulled = pull_back(_cast(momentum, old_params))[0]
        fresh_momentum = getattr(new, field)
        pulled = jax.tree.map(
            lambda x, other: placement.kept(x, placement.sharding_of(other)),
            _cast(pulled, fresh_momentum),
            fresh_momentum,
        )
        return old._replace(**{field: pulled})

    restarted: list[str] = []
    return _walk(opt_state, fresh, convert, restarted), restarted


def restart_schedules(
    opt_state: optax.OptState, fresh: optax.OptState
) -> optax.OptState:
    """Returns the state with the counters of its schedules taken from a fresh one."""

    def restart(old: Any, new: Any) -> Any:
        if isinstance(old, SCHEDULES):
            return placement.beside(new, old)
        if not _is_state(old):
            return old
        fields = zip(old, new, strict=True)
        return type(old)(*(_walk(a, b, restart, []) for a, b in fields))

    return _walk(opt_state, fresh, restart, [])


def _cast(tree: Any, like: Any) -> Any:
    """A tree in the dtypes of another; a momentum may be kept in fewer bits."""
    return jax.tree.map(lambda x, other: x.astype(other.dtype), tree, like)


def _walk(
    old: Any,
    fresh: Any,
    change: Callable[[Any, Any], Any | None],
    restarted: list[str],
) -> Any:
    """Goes through two states of one optimizer side by side, from the outside in.

    `change` is asked about each part: a named tuple with arrays, or a tree of arrays
    that somebody's transformation keeps without one. It returns what becomes of the
    part, or None where it must start anew; then it is on the mesh that it was on.
    """
    if not jax.tree.leaves(old):
        return old
    if not _is_state(old) and _holds_state(old):
        children, structure = _children(old)
        others, _ = _children(fresh)
        return jax.tree.unflatten(
            structure,
            [
                _walk(child, other, change, restarted)
                for child, other in zip(children, others, strict=True)
            ],
        )
    new = change(old, fresh)
    if new is None:
        restarted.append(type(old).__name__)
        return placement.beside(fresh, old)
    return new


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda child: child is not node)


def _holds_state(node: Any) -> bool:
    """Whether there is a state with arrays in it, or it is one."""
    nodes = jax.tree.leaves(node, is_leaf=_is_state)
    return any(_is_state(child) and jax.tree.leaves(child) for child in nodes)


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
