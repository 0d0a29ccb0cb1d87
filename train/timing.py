"""What truncation measures: layers' times to choose by, and what comes of a choice."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
from flax import nnx

from lowrank_jax import errors, latency, paths, surgery
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.forms import FORMS, Factors
from lowrank_jax.ranks import Ranks
from lowrank_jax.times import MERGED, ModelTimes
from train import folders

Inputs: TypeAlias = Sequence[jax.ShapeDtypeStruct]
"""A model's inputs, for one example where nothing else is said."""

AUTO = "auto"
"""The form that is the fastest, layer by layer."""
CHOICES = (AUTO, *sorted((*FORMS, MERGED)))
_TRIES = 6
_TOLERANCE = 1.05  # of the budget; what is measured twice differs by so much


class Timing(NamedTuple):
    """How times are measured.

    Args:
      form: The form that cut layers take, one of `CHOICES`.
      table: File of the layers' times; None for this device's own among the user's
        caches.
      any_device: Take a table of another device.
      batch_size: Examples in a call.
    """

    form: str = Factors.form
    table: str | Path | None = None
    any_device: bool = False
    batch_size: int = 1

    def times(
        self, model: nnx.Module, inputs: Inputs, at_ranks: Ranks | None = None
    ) -> ModelTimes:
        """Returns a low-rank model's times, see `latency.LatencyTable.times`."""
        path = _cached_table() if self.table is None else self.table
        table = latency.LatencyTable(path, any_device=self.any_device)
        forms = (*FORMS, MERGED) if self.form == AUTO else (self.form,)
        return table.times(model, *self._batch(inputs), forms=forms, at_ranks=at_ranks)

    def open_table(self) -> latency.LatencyTable:
        """Opens the table of layers' times.

        Raises:
          UserError: It is of another device, or cannot be kept.
        """
        path = _cached_table() if self.table is None else Path(self.table)
        with errors.at("--latency_table"):
            if not path.exists():
                folders.check_new_file(path)
            return latency.LatencyTable(path, any_device=self.any_device)

    def formed(self, model: nnx.Module, inputs: Inputs) -> nnx.Module:
        """Returns a cut model with its layers in their form."""
        if self.form == Factors.form:
            return model
        found = paths.find_factors(model)
        if self.form != AUTO:
            return surgery.take_forms(model, dict.fromkeys(found, self.form))
        ranks = {path: factors.get_rank() for path, factors in found.items()}
        times = self.times(model, inputs, ranks)
        return surgery.take_forms(
            model, {path: times.layers[path].fastest(ranks[path]) for path in ranks}
        )

    def measure(
        self, models: Mapping[str, nnx.Module], inputs: Inputs
    ) -> dict[str, float]:
        """Returns what a call of each takes, in ms, measured in turn."""
        found = latency.measure(models, *self._batch(inputs))
        return {name: nanoseconds / 1e6 for name, nanoseconds in found.items()}

    def _batch(self, inputs: Inputs) -> Inputs:
        return [
            jax.ShapeDtypeStruct((self.batch_size, *one.shape[1:]), one.dtype)
            for one in inputs
        ]


def fitting(
    fraction: float,
    choose: Callable[[float], Ranks],
    share_of: Callable[[Ranks], float],
) -> Ranks:
    """Returns ranks whose model is measured to take a share of the dense one's time.

    Predictions are of layers by themselves: where the model takes longer, ranks are
    chosen again for as much less.

    Args:
      fraction: The share, in (0, 1].
      choose: Chooses ranks that are predicted to take a share.
      share_of: Measures the share that ranks take.

    Raises:
      UserError: None are found.
    """
    wanted, too_slow, too_small = fraction, fraction, 0.0
    for _ in range(_TRIES):
        try:
            ranks = choose(wanted)
        except SmallBudget:
            if wanted == fraction:
                raise
            too_small = wanted
            wanted = (too_small + too_slow) / 2
            continue
        share = share_of(ranks)
        print(f"{share:.3f} of the dense model's time is measured", flush=True)
        if share <= _TOLERANCE * fraction:
            return ranks
        too_slow = wanted
        wanted *= fraction / share
        if too_small:  # a smaller one would not do
            wanted = max(wanted, (too_small + too_slow) / 2)
    raise UserError(
        "latency: must be met by what is measured, got no ranks that take"
        f" {fraction:.3g} of the dense model's time. Raise the budget, or measure on an"
        " idle machine."
    )


def _cached_table() -> Path:
    """This device's own file among the user's caches."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(latency.device_name().encode()).hexdigest()
    return caches / "lowrank_jax" / "latency" / f"{digest[:16]}.json"
