"""Measured times of a model and its layers, as functions of rank."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import numpy as np

from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import Ranks, RankValue, flatten_rank, largest, lowest

MERGED = "merged"
"""The form of a layer whose kernel is dense again, beside those of `forms.FORMS`."""


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """How long a layer takes, in ns.

    Args:
      dense_latency: With its dense kernel.
      forms: By the forms that it may take: the times at the ranks that were measured.
        Between two of them the time is on a line, and no lower rank takes longer.
    """

    dense_latency: float
    forms: Mapping[str, Mapping[int, float]]

    def latency(self, rank: RankValue) -> float:
        """Returns the time of the fastest form; of several matrices, their mean."""
        times = [
            min(self.at(form, one) for form in self.forms) for one in flatten_rank(rank)
        ]
        return float(np.mean(times))

    def fastest(self, rank: RankValue) -> str:
        """Returns the form that takes the least time at a rank."""
        return min(self.forms, key=lambda form: self.at(form, largest(rank)))

    def at(self, form: str, rank: int) -> float:
        """Returns the time of one form."""
        ranks = sorted(self.forms[form])
        times = [self.forms[form][one] for one in ranks]
        return float(np.interp(rank, ranks, np.maximum.accumulate(times)))

    def largest_as_fast(self, rank: int, active: int, multiple_of: int = 1) -> int:
        """Returns the largest rank that takes no longer: where a layer is no faster
        than dense, all of it (rank quantisation, arXiv 2309.03824)."""
        limit = self.latency(rank)
        for higher in range(active, rank, -1):
            allowed = higher == active or higher % multiple_of == 0
            if allowed and self.latency(higher) <= limit:
                return higher
        return rank

    def less(self, nanoseconds: float) -> "LayerTimes":
        """Returns the times without some that all of them hold; a hundredth is left,
        so that what is faster stays so."""
        return self._each(lambda time: max(time - nanoseconds, time / 100))

    def scaled(self, factor: float) -> "LayerTimes":
        """Returns the times multiplied."""
        return self._each(lambda time: time * factor)

    def _each(self, function: Callable[[float], float]) -> "LayerTimes":
        forms = {
            form: {rank: function(time) for rank, time in times.items()}
            for form, times in self.forms.items()
        }
        return LayerTimes(function(self.dense_latency), forms)

    def __add__(self, other: "LayerTimes") -> "LayerTimes":
        """Returns the times of two layers with the same factors."""
        forms = {
            form: {rank: times[rank] + other.at(form, rank) for rank in times}
            for form, times in self.forms.items()
        }
        return LayerTimes(self.dense_latency + other.dense_latency, forms)


class ModelTimes(NamedTuple):
    """How long a model takes as a function of its ranks, in ns.

    What is not in factored layers takes what is left of the dense model's time.

    Args:
      dense: The dense model.
      layers: Of each factored layer by path.
    """

    dense: float
    layers: Mapping[str, LayerTimes]

    @classmethod
    def of(cls, dense: float, layers: Mapping[str, LayerTimes]) -> Self:
        """Makes the times of a model of which the layers take no more than all."""
        sum_of_layers = sum(layer.dense_latency for layer in layers.values())
        if sum_of_layers > dense:  # by themselves, they take longer
            factor = dense / sum_of_layers
            layers = {path: layer.scaled(factor) for path, layer in layers.items()}
        return cls(dense, layers)

    def predict(self, ranks: Ranks) -> float:
        """Returns the time at some ranks, each layer in its fastest form."""
        saved = sum(
            self.layers[path].dense_latency - self.layers[path].latency(rank)
            for path, rank in ranks.items()
        )
        return self.dense - saved

    def share_of_layers(self, fraction: float, ranks: Ranks) -> float:
        """Returns the share of the layers' dense time that a budget leaves to them.

        Args:
          fraction: Share of the dense model's time, in (0, 1].
          ranks: Active ranks.

        Raises:
          UserError: The share is out of bounds.
          SmallBudget: Rank 1 everywhere takes longer.
        """
        if not 0 < fraction <= 1:
            raise UserError(
                f"latency_fraction: must be in (0, 1], got {fraction}. Give a share of"
                " the dense model's time."
            )
        least = self.predict({path: lowest(rank, 1) for path, rank in ranks.items()})
        if fraction < 1 and least > fraction * self.dense:
            raise SmallBudget(
                f"latency_fraction: must be at least {least / self.dense:.4g} here"
                f" (rank 1 in every layer) of {self.dense / 1e6:.4g} ms, got"
                f" {fraction:.4g}. Raise it."
            )
        layers = sum(self.layers[path].dense_latency for path in ranks)
        return 1 - (1 - fraction) * self.dense / layers if layers else 1.0

    def raised(
        self, ranks: Ranks, active: Ranks, multiple_of: int = 1
    ) -> dict[str, RankValue]:
        """Raises ranks as far as it takes no time."""
        found = {}
        for path, rank in ranks.items():
            pairs = zip(flatten_rank(rank), flatten_rank(active[path]), strict=True)
            layer = self.layers[path]
            one = [layer.largest_as_fast(*pair, multiple_of) for pair in pairs]
            found[path] = np.reshape(one, np.shape(rank)).tolist()
        return found
