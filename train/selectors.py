"""Rank selectors by name: what cuts a checkpoint, and what a phase ends with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lowrank_jax import errors
from lowrank_jax.counting import ModelCost
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, at_fraction, at_most
from lowrank_jax.selection import search, solvers
from train import registry


class Context(NamedTuple):
    """What a selector may look at.

    Args:
      ranks: The model's ranks.
      cost: What it costs.
      importances: Reads the weights: importance of each column by path.
      score: Scores of rank vectors on held-out training data, higher is better; None
        where there is no data.
    """

    ranks: Ranks
    cost: ModelCost
    importances: Callable[[], Mapping[str, Float[np.ndarray, "*stack r"]]]
    score: Callable[[Sequence[Ranks]], list[float]] | None


def rank(context: Context, *, value: int) -> dict[str, Any]:
    """Every layer at most this rank."""
    return at_most(context.ranks, value)


def rank_fraction(context: Context, *, value: float) -> dict[str, Any]:
    """This fraction of each layer's rank, rounded up."""
    return at_fraction(context.ranks, value)


def ranks(context: Context, *, value: Ranks) -> dict[str, Any]:
    """These ranks by path."""
    return dict(value)


def energy(context: Context, *, value: float) -> dict[str, Any]:
    """Least prefix of each layer with this share of the squared importances."""
    return solvers.by_energy(context.importances(), value)


def params_fraction(context: Context, *, value: float) -> dict[str, Any]:
    """One fraction of all ranks, within this share of the factored layers' dense
    parameters."""
    return solvers.by_params_fraction(context.cost.layers, context.ranks, value)


def macs_fraction(context: Context, *, value: float) -> dict[str, Any]:
    """One fraction of all ranks, within this share of their dense MACs."""
    return solvers.by_macs_fraction(context.cost.layers, context.ranks, value)


def energy_budget(context: Context, *, measure: str, fraction: float) -> dict[str, Any]:
    """One share of energy for all layers, within a share of dense "params" or
    "macs"."""
    return solvers.by_energy_budget(
        context.cost.layers, context.importances(), fraction, measure=measure
    )


def beam(
    context: Context, *, measure: str, fraction: float, width: int, steps: int
) -> dict[str, Any]:
    """Beam search on held-out training data (BSR), within the same kind of budget."""
    if context.score is None:
        raise UserError(
            "beam: needs held-out training images to score models on, got none. Set"
            " config.data.validation_examples above 0."
        )
    return search.beam_search(
        context.score,
        context.cost.layers,
        context.ranks,
        fraction,
        measure=measure,
        width=width,
        steps=steps,
    )


SELECTORS: dict[str, Callable[..., dict[str, Any]]] = {
    selector.__name__: selector
    for selector in (
        rank,
        rank_fraction,
        ranks,
        energy,
        params_fraction,
        macs_fraction,
        energy_budget,
        beam,
    )
}


def select(where: str, spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The ranks that a selector, given by name and arguments, chooses."""
    with errors.at(f"config.{where}"):
        return registry.build(spec, SELECTORS, context)
