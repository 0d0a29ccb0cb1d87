"""What a phase ends with: actions that change the model, and the optimizer state that
goes with it."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx

from lowrank_jax import factorization, optimizer_state, shrinking, surgery
from lowrank_jax.active import check_ranks, get_ranks, max_ranks
from lowrank_jax.counting import ModelCost
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import curves, solvers
from train import selectors
from train.config import pairs as rule_pairs


class Context(NamedTuple):
    """What an action may use.

    Args:
      cost: Counts a model.
      scorer: Makes a function that scores a model at rank vectors on held-out training
        images, higher is better; None where no images are held out.
      recalibrate: A copy of a model with BatchNorm re-estimated on training batches.
      initial_stable_ranks: Of each layer when the run began; None where the run does
        not need them.
      target_ranks: What `select` chose, if it did.
      preview: The run has not begun: the model is abstract, and nothing but its shapes
        can be known. Actions check their arguments and return what has the final
        structure, at the largest ranks that are possible.
    """

    cost: Callable[[nnx.Module], ModelCost]
    scorer: Callable[[nnx.Module], Callable[[Sequence[Ranks]], list[float]]] | None
    recalibrate: Callable[[nnx.Module, int], nnx.Module]
    initial_stable_ranks: Mapping[str, Any] | None
    target_ranks: Mapping[str, Any] | None
    preview: bool


class Change(NamedTuple):
    """What an action did.

    Args:
      model: The new model.
      kind: How its parameters relate to the old ones: "same", "cut" (a prefix of the
        ranks), "factorized" (kernels became factors) or "rotated" (neither).
      target_ranks: Ranks chosen for later phases, if it chose any.
    """

    model: nnx.Module
    kind: str
    target_ranks: dict[str, Any] | None = None


Action = Callable[[nnx.Module, Context], Change]


def canonicalize() -> Action:
    """Factors become the SVD of their product, deeper ones two (or u, s, v) again."""

    def action(model: nnx.Module, context: Context) -> Change:
        if context.preview:
            return Change(nnx.eval_shape(surgery.canonicalize, model), "rotated")
        return Change(surgery.canonicalize(model), "rotated")

    return action


def merge() -> Action:
    """Low-rank layers become dense ones."""

    def action(model: nnx.Module, context: Context) -> Change:
        if context.preview:
            return Change(nnx.eval_shape(surgery.merge, model), "rotated")
        return Change(surgery.merge(model), "rotated")

    return action


def factorize(*, rules: Sequence[Sequence[Any]]) -> Action:
    """Dense layers become low-rank by the SVD of their kernels.

    Args:
      rules: As `config.rank_rules`.
    """
    return functools.partial(_factorize, rules=rule_pairs(rules, "rules"))


def factorize_at_stable_rank(*, rules: Sequence[Sequence[Any]]) -> Action:
    """Cuttlefish: dense layers become low-rank at their scaled stable rank.

    Layers that would not run with fewer MACs at that rank stay dense (Wang et al.,
    2023, time them; we count).

    Args:
      rules: As `config.rank_rules`; layers with "dense" stay, the ranks of the others
        are the upper limit of what is found.
    """
    pairs = rule_pairs(rules, "rules")
    if any(isinstance(rule, Mapping) and "scheme" in rule for _, rule in pairs):
        raise UserError(
            "factorize_at_stable_rank: rules must not have a scheme, since the stable"
            f" rank is that of scheme 0, got {rules}. Drop it."
        )

    def action(model: nnx.Module, context: Context) -> Change:
        if low := list(find_factors(model)):
            raise UserError(f"needs a dense model, got low-rank layers {low}.")
        if context.preview:
            return _factorize(model, context, rules=pairs)
        matrices = factorization.kernel_matrices(model)
        found = solvers.scaled_stable_ranks(
            curves.stable_ranks(matrices),
            context.initial_stable_ranks,
            {path: min(matrix.shape[-2:]) for path, matrix in matrices.items()},
        )
        low_rank = factorization.factorize(model, pairs)
        layers, chosen, ranks = context.cost(low_rank).layers, [], {}
        for pattern, rule in factorization.rules_of(low_rank):
            path = next((p for p in layers if re.escape(p) == pattern), None)
            if path is not None:
                rank = np.minimum(rule["max_rank"], found[path]).tolist()
                if layers[path].factored_macs(rank) < layers[path].dense_macs:
                    ranks[path] = rank
                else:
                    rule = "dense"
            chosen.append((pattern, rule))
        low_rank = factorization.factorize(model, chosen)
        return Change(surgery.truncate(low_rank, ranks), "factorized")

    return action


def truncate(*, selector: Mapping[str, Any]) -> Action:
    """Layers are cut to the ranks that a selector chooses.

    Args:
      selector: Name and arguments, of `train.selectors`; "selected" takes the ranks
        that `select` chose at the end of an earlier phase.
    """

    def action(model: nnx.Module, context: Context) -> Change:
        ranks = _select(selector, model, context)
        if context.preview:  # lower ranks are not known yet, these are the highest
            check_ranks(model, ranks)
            return Change(model, "cut")
        return Change(surgery.truncate(model, ranks), "cut")

    return action


def select(*, selector: Mapping[str, Any]) -> Action:
    """Ranks are chosen for later phases; the model stays.

    They are what "selected" means as a penalty's `target_ranks` and as a selector.

    Args:
      selector: Name and arguments, of `train.selectors`.
    """

    def action(model: nnx.Module, context: Context) -> Change:
        return Change(model, "same", _select(selector, model, context))

    return action


def recalibrate(*, batches: int) -> Action:
    """BatchNorm's statistics are re-estimated on so many training batches."""
    if batches < 1:
        raise UserError(f"batches: must be at least 1, got {batches}.")

    def action(model: nnx.Module, context: Context) -> Change:
        if context.preview:
            return Change(model, "same")
        return Change(context.recalibrate(model, batches), "same")

    return action


ACTIONS: dict[str, Callable[..., Action]] = {
    action.__name__: action
    for action in (
        canonicalize,
        merge,
        factorize,
        factorize_at_stable_rank,
        truncate,
        select,
        recalibrate,
    )
}

REASONS = {
    "factorized": "squares of a kernel's gradients say nothing about its factors'",
    "rotated": "its columns are not the ones the moments belong to",
    "cut": "it has no form for fewer columns",
}
"""Why a part of an optimizer state starts anew after a change of this kind."""


def carry_opt_state(
    kind: str,
    old_model: nnx.Module,
    new_model: nnx.Module,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
) -> tuple[optax.OptState, list[str]]:
    """The optimizer state for the changed model, and the parts that start anew.

    Args:
      kind: Of the `Change`.
      old_model: Before it.
      new_model: After it.
      opt_state: Before it.
      optimizer: The phase's.
    """
    if kind == "same":
        return opt_state, []
    params = nnx.as_pure(nnx.state(new_model, nnx.Param))
    fresh = optimizer.init(params)
    if kind == "cut":
        return shrinking.carry_opt_state(old_model, new_model, opt_state, optimizer)
    if kind == "rotated":
        return fresh, ["state"]
    graphdef, _, rest = nnx.split(new_model, nnx.Param, ...)
    changed = {*find_factors(new_model)} - {*find_factors(old_model)}

    def to_old(params: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        return nnx.as_pure(nnx.state(surgery.merge(model, changed), nnx.Param))

    return optimizer_state.convert_opt_state(opt_state, fresh, to_old, params)


def _factorize(
    model: nnx.Module, context: Context, *, rules: Sequence[tuple[str, Any]]
) -> Change:
    make = functools.partial(factorization.factorize, rules=rules, where="rules")
    new = nnx.eval_shape(make, model) if context.preview else make(model)
    return Change(new, "factorized")


def _select(
    spec: Mapping[str, Any], model: nnx.Module, context: Context
) -> dict[str, Any]:
    if not isinstance(spec, Mapping) or set(spec) != {"name", "args"}:
        raise UserError(
            "selector: must be a mapping of 'name' and 'args', got"
            f" {spec!r}. Correct it."
        )
    if spec["name"] == "selected":
        if context.target_ranks is None:
            raise UserError(
                "selector 'selected': needs an action 'select' at the end of an earlier"
                " phase, got none. Add one."
            )
        return dict(context.target_ranks)
    return selectors.select(
        "selector",
        spec,
        selectors.Context(
            max_ranks(model) if context.preview else get_ranks(model),
            context.cost(model),
            functools.partial(_importances, model, context.preview),
            context.scorer and context.scorer(model),
        ),
    )


def _importances(model: nnx.Module, preview: bool) -> dict[str, Any]:
    factors = find_factors(model)
    if not preview:
        return curves.column_importances(factors)
    return {path: np.ones(one.v.shape[:-1]) for path, one in factors.items()}
