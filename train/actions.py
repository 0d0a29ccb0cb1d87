"""What a phase ends with: actions that change the model.

An action chooses (ranks, rules, statistics: from values, losses, data), then applies
its choice, which changes shapes by arithmetic alone. So the check before the first step
runs the same two halves: the choice with what can be known then, and, abstractly, the
largest choice applied.
"""

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lowrank_jax import (
    active,
    counting,
    errors,
    factorization,
    families,
    paths,
    surgery,
)
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, lowest
from lowrank_jax.selection import spectral
from train import registry, schema, selecting


class Context(NamedTuple):
    """What an action may ask about a model.

    Args:
      cost: Counts it.
      select: Runs a selector, given by name and arguments, on it.
      stable_ranks: Measures the stable rank of each layer.
      batch_statistics: Re-estimates BatchNorm on so many training batches; the new
        statistics, or an empty state without BatchNorm.
      initial_stable_ranks: Of each layer when the run began; None where the run does
        not need them.
      target_ranks: What `select` chose, if it did.
    """

    cost: Callable[[nnx.Module], counting.ModelCost]
    select: Callable[[nnx.Module, Mapping[str, Any]], dict[str, Any]]
    stable_ranks: Callable[[nnx.Module], Mapping[str, Any]]
    batch_statistics: Callable[[nnx.Module, int], nnx.State]
    initial_stable_ranks: Mapping[str, Any] | None
    target_ranks: Mapping[str, Any] | None


class Kind(enum.Enum):
    """How the parameters after an action relate to those before it."""

    SAME = "same"
    CUT = "a prefix of the ranks"
    FACTORIZED = "kernels became factors"
    ROTATED = "the columns are others"
    MERGED = "factors became kernels"


def _only_choice(model: nnx.Module, choice: Any) -> Any:
    return choice


class Action(NamedTuple):
    """A change of the model between two phases.

    Args:
      choose: From the model and its context to what shall be done.
      apply: From the model and the choice to the new model; runs on abstract models.
      kind: How the parameters relate.
      largest: From an abstract model and a choice made on it to the choice with the
        largest model that is possible once values are known.
      selects: Which field of `phases.Selected` the choice is, "" for none.
    """

    choose: Callable[[nnx.Module, Context], Any]
    apply: Callable[[nnx.Module, Any], nnx.Module]
    kind: Kind
    largest: Callable[[nnx.Module, Any], Any] = _only_choice
    selects: str = ""


def canonicalize() -> Action:
    """Turns factors into the SVD of their product, deeper ones into two."""
    return Action(
        lambda model, context: None,
        lambda model, choice: surgery.canonicalize(model),
        Kind.ROTATED,
    )


def merge() -> Action:
    """Makes low-rank layers dense."""
    return Action(
        lambda model, context: None,
        lambda model, choice: surgery.merge(model),
        Kind.MERGED,
    )


def factorize(*, rules: Sequence[Sequence[Any]]) -> Action:
    """Makes dense layers low-rank by the SVD of their kernels.

    Args:
      rules: As `config.rank_rules`.
    """
    pairs = schema.pairs(rules)
    return Action(
        lambda model, context: pairs, factorization.factorize, Kind.FACTORIZED
    )


def factorize_at_stable_rank(*, rules: Sequence[Sequence[Any]]) -> Action:
    """Makes dense layers low-rank at their scaled stable rank, as Cuttlefish does.

    Layers that would not run with fewer MACs at that rank stay dense (Wang et al.,
    2023, time them; we count).

    Args:
      rules: As `config.rank_rules`; layers with "dense" stay, the ranks of the others
        are the upper limit of what is found.
    """
    pairs = schema.pairs(rules)
    if any(isinstance(rule, Mapping) and "scheme" in rule for _, rule in pairs):
        raise UserError(
            "rules: must not have a scheme, since the stable rank is that of scheme 0,"
            f" got {rules}. Drop it."
        )

    def choose(model: nnx.Module, context: Context) -> tuple[list[Any], Ranks]:
        if low := list(paths.find_factors(model)):
            raise UserError(
                f"needs a dense model, got low-rank layers {low}. Merge them before."
            )
        matrices = nnx.eval_shape(factorization.kernel_matrices, model)
        found = spectral.scaled_stable_ranks(
            context.stable_ranks(model),
            context.initial_stable_ranks,
            {path: min(matrix.shape[-2:]) for path, matrix in matrices.items()},
        )
        low_rank = nnx.eval_shape(lambda m: factorization.factorize(m, pairs), model)
        layers = context.cost(low_rank).layers
        chosen: list[Any] = []
        ranks: dict[str, Any] = {}
        for pattern, rule in factorization.rules_of(low_rank):
            # every pattern is a literal path, but for the last one, for what is dense
            path = next((p for p in layers if re.escape(p) == pattern), None)
            if path is not None:
                rank = np.minimum(rule["max_rank"], found[path]).tolist()
                if layers[path].factored_macs(rank) < layers[path].dense_macs:
                    ranks[path] = rank
                else:
                    rule = "dense"
            chosen.append((pattern, rule))
        return chosen, ranks

    def apply(model: nnx.Module, choice: tuple[list[Any], Ranks]) -> nnx.Module:
        chosen, ranks = choice
        return surgery.truncate(factorization.factorize(model, chosen), ranks)

    return Action(
        choose, apply, Kind.FACTORIZED, largest=lambda model, choice: (pairs, {})
    )


def truncate(*, selector: Mapping[str, Any]) -> Action:
    """Cuts layers to the ranks that a selector chooses.

    Args:
      selector: Name and arguments, of `lowrank_jax.selection`; "selected" takes the
        ranks that `select` chose at the end of an earlier phase.
    """
    choose = _chooser(selector)
    if selector["name"] in selecting.BY_RANKS:
        return Action(choose, surgery.truncate, Kind.CUT)
    return Action(
        choose,
        surgery.truncate,
        Kind.CUT,
        largest=lambda model, choice: active.max_ranks(model),
    )


def select(*, selector: Mapping[str, Any]) -> Action:
    """Chooses ranks for later phases; the model stays.

    They are what "selected" means as a penalty's `target_ranks` and as a selector.

    Args:
      selector: Name and arguments, of `lowrank_jax.selection`.
    """
    return Action(
        _chooser(selector),
        lambda model, choice: model,
        Kind.SAME,
        selects="target_ranks",
    )


def select_family(*, fractions: Sequence[float]) -> Action:
    """Chooses which ranks a size has from here on; the model stays.

    At each of the fractions one share of energy in all layers, at no more MACs than
    this fraction of every rank has: `energy_fraction`, of a model whose columns are in
    their order, as after `factorize` and `canonicalize`. Samplers take the family by
    the name "selected", and evaluation, truncation and generation for a fraction of the
    ranks.

    Args:
      fractions: In (0, 1).
    """
    ordered = sorted(fractions, reverse=True)
    if not ordered or not all(0 < x < 1 for x in ordered):
        raise UserError(
            f"fractions: must hold numbers in (0, 1), got {fractions}. The whole model"
            " is always there."
        )

    def choose(model: nnx.Module, context: Context) -> list[list[Any]]:
        def spec(fraction: float) -> dict[str, Any]:
            return {"name": "energy_fraction", "args": {"value": fraction}}

        family = [[x, context.select(model, spec(x))] for x in ordered]
        families.check(family, active.rank_limits(model))
        return family

    return Action(choose, lambda model, choice: model, Kind.SAME, selects="family")


def recalibrate(*, batches: int) -> Action:
    """Re-estimates BatchNorm's statistics on so many training batches."""
    if batches < 1:
        raise UserError(f"batches: must be at least 1, got {batches}. Raise it.")

    def apply(model: nnx.Module, statistics: Any) -> nnx.Module:
        model = nnx.clone(model)
        nnx.update(model, statistics)
        return model

    return Action(
        lambda model, context: context.batch_statistics(model, batches),
        apply,
        Kind.SAME,
    )


ACTIONS: dict[str, Callable[..., Action]] = {
    action.__name__: action
    for action in (
        canonicalize,
        merge,
        factorize,
        factorize_at_stable_rank,
        truncate,
        select,
        select_family,
        recalibrate,
    )
}
"""The actions by the name they have in configs."""


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out the default arguments of an action, and of its selector."""
    spec = registry.complete(spec, ACTIONS)
    selector = spec["args"].get("selector")
    if selector is None:
        return spec
    errors.raise_all(schema.compare(selector, schema.NAMED, "selector"))
    if selector["name"] != "selected":
        args = {**spec["args"], "selector": selecting.complete(selector)}
        return {**spec, "args": args}
    return spec


def _chooser(
    spec: Mapping[str, Any],
) -> Callable[[nnx.Module, Context], dict[str, Any]]:
    """What runs a selector, given by name and arguments, on a model."""
    errors.raise_all(schema.compare(spec, schema.NAMED, "selector"))

    def choose(model: nnx.Module, context: Context) -> dict[str, Any]:
        if spec["name"] != "selected":
            return context.select(model, spec)
        if context.target_ranks is None:
            raise UserError(
                "selector 'selected': needs an action 'select' at the end of an earlier"
                " phase, got none. Add one."
            )
        limits = active.rank_limits(model)  # layers may have been cut since
        return {
            path: lowest(rank, limits[path].active) if path in limits else rank
            for path, rank in context.target_ranks.items()
        }

    return choose
