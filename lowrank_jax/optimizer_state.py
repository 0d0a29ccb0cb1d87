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

from collections.abc import Callable
from typing import Any

import jax
import optax

# two states are not exported by name; abstractly, since an array here would start the
# backend, after which jax.distributed.initialize fails
_CORRECTED_RMS = type(
    jax.eval_shape(lambda: optax.scale_by_rms(bias_correction=True).init({}))
)
_INJECTED_SCHEDULE = type(
    jax.eval_shape(optax.schedules.WrappedSchedule(lambda count: 0.0).init)
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

    def prefix(old: jax.Array, new: jax.Array) -> jax.Array:
        return old[tuple(slice(size) for size in jax.numpy.shape(new))]

    def cut(old: Any, new: Any) -> Any | None:
        if not isinstance(old, ELEMENTWISE):
            return None
        return type(old)(
            *(
                _walk(a, b, cut, prefix, restarted)
                for a, b in zip(old, new, strict=True)
            )
        )

    restarted: list[str] = []
    return _walk(opt_state, fresh, cut, prefix, restarted), restarted


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

    def convert(old: Any, new: Any) -> Any | None:
        if isinstance(old, SCHEDULES):
            return old
        if type(old) not in LINEAR:
            return None
        field = LINEAR[type(old)]
        momentum = getattr(old, field)
        if jax.tree.structure(momentum) != jax.tree.structure(old_params):
            return None  # masked: some parts are missing
        pulled = pull_back(_cast(momentum, old_params))[0]
        return old._replace(**{field: _cast(pulled, getattr(new, field))})

    restarted: list[str] = []
    return _walk(opt_state, fresh, convert, _kept, restarted), restarted


def restart_schedules(
    opt_state: optax.OptState, fresh: optax.OptState
) -> optax.OptState:
    """The state with the counters of its schedules taken from a fresh one."""

    def restart(old: Any, new: Any) -> Any:
        if isinstance(old, SCHEDULES):
            return new
        fields = zip(old, new, strict=True)
        return type(old)(*(_walk(a, b, restart, _kept, []) for a, b in fields))

    return _walk(opt_state, fresh, restart, _kept, [])


def _cast(tree: Any, like: Any) -> Any:
    """A tree in the dtypes of another; a momentum may be kept in fewer bits."""
    return jax.tree.map(lambda x, other: x.astype(other.dtype), tree, like)


def _kept(old: Any, fresh: Any) -> Any:
    return old


def _walk(
    old: Any,
    fresh: Any,
    change_state: Callable[[Any, Any], Any | None],
    change_leaf: Callable[[Any, Any], Any],
    restarted: list[str],
) -> Any:
    """Goes through two states of one optimizer side by side, from the outside in.

    `change_state` returns what becomes of a state (a named tuple with arrays), or None
    where it must start anew.
    """
    if _is_state(old):
        if not jax.tree.leaves(old):
            return old
        new = change_state(old, fresh)
        if new is None:
            restarted.append(type(old).__name__)
            return fresh
        return new
    nodes, structure = jax.tree.flatten(old, is_leaf=_is_state)
    others = jax.tree.leaves(fresh, is_leaf=_is_state)
    changed = [
        _walk(a, b, change_state, change_leaf, restarted)
        if _is_state(a)
        else change_leaf(a, b)
        for a, b in zip(nodes, others, strict=True)
    ]
    return jax.tree.unflatten(structure, changed)


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
