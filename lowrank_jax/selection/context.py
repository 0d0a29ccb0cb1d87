"""What a selector may look at: costs, weights, scores on data, measured times."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from lowrank_jax.counting import ModelCost
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.ranks import Ranks
from lowrank_jax.selection import curves, tails
from lowrank_jax.selection.budgets import Costs
from lowrank_jax.selection.tails import Errors
from lowrank_jax.times import ModelTimes

Score: TypeAlias = Callable[[Sequence[Ranks]], list[float]]
"""Scores of rank vectors on held-out data, higher is better."""


class Context(NamedTuple):
    """What a selector may look at.

    Args:
      ranks: Active rank of each layer: none is raised.
      cost: What the model costs.
      importances: Reads the weights: importance of each column by path.
      spectra: Reads the weights: singular values of each product by path.
      score: Scores rank vectors; None where there is nothing to score on.
      aliases: Further paths of shared factors, as of `find_aliases`.
      family: Ranks of sizes that the model was trained at, see `lowrank_jax.families`.
      times: Measures how long the model takes; None where nothing is to be measured.
      activations: Runs the model: what each rank loses of its layer's outputs, as of
        `activations.output_losses`; None where there is nothing to run it on.
    """

    ranks: Ranks
    cost: ModelCost
    importances: Callable[[], Mapping[str, Float[np.ndarray, "*stack r"]]]
    spectra: Callable[[], Mapping[str, Float[np.ndarray, "*stack n"]]]
    score: Score | None = None
    aliases: Mapping[str, str] = {}
    family: Family = ()
    times: Callable[[], ModelTimes] | None = None
    activations: Callable[[], Errors] | None = None

    def costs(self, measure: str) -> Costs:
        """Returns what the layers cost, in "params", "macs" or "latency"."""
        if measure != "latency":
            return self.cost.layers
        if self.times is None:
            raise UserError(
                "measure: 'latency' must have measured times, got none. Give them as"
                " times, see lowrank_jax.latency."
            )
        return self.times().layers

    def share(self, measure: str, fraction: float) -> float:
        """Returns a budget as a share of what the factored layers cost when dense."""
        if measure != "latency" or self.times is None:
            return fraction
        return self.times().share_of_layers(fraction, self.ranks)

    def raised(self, measure: str, ranks: Ranks, multiple_of: int = 1) -> Ranks:
        """Returns ranks as high as takes no more time, where it is time that is paid
        for."""
        if measure != "latency" or self.times is None:
            return ranks
        return self.times().raised(ranks, self.ranks, multiple_of)

    def errors(self, curve: str) -> Errors:
        """Returns what each rank loses, by the weights (a key of `tails.TAILS`), by the
        score ("loss") or by the outputs of layers ("activations")."""
        if curve == "loss":
            return curves.losses(self.scorer(), self.ranks)
        if curve == "activations":
            if self.activations is None:
                raise UserError(
                    "activations: must be there, from held-out training data, got none."
                    " Give a function as activations, or hold out training examples."
                )
            return self.activations()
        return tails.list_errors(self.importances(), self.ranks, curve)

    def scorer(self) -> Score:
        """Returns the score, which must be there."""
        if self.score is None:
            raise UserError(
                "score: must be there, from held-out training data, got none. Give a"
                " function as score, or hold out training examples."
            )
        return self.score
