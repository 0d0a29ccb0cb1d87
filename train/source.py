"""A checkpoint opened to be cut: what its ranks can be chosen by, and loads at them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lowrank_jax import (
    active,
    calibration,
    checkpoint,
    counting,
    errors,
    factorization,
    paths,
    surgery,
)
from lowrank_jax.factors import Factors
from lowrank_jax.ranks import Ranks, check_lower
from lowrank_jax.selection import curves
from lowrank_jax.selection.context import Context, Score
from lowrank_jax.selection.tails import Errors
from lowrank_jax.times import ModelTimes
from train import scoring
from train.model import (
    abstract_checkpoint_model,
    checkpoint_task,
    example_inputs,
    family_of,
    model_cost,
)
from train.report import logs
from train.run import Run, open_checkpoint_run
from train.timing import Timing

_FACTORIZED = ((".*", "full"),)


class Source:
    """A checkpoint to cut; a dense one is factorized first, every layer by its SVD.

    Nothing but its metadata is read before something asks for more.

    Args:
      step: The checkpoint.
      data_dir: Where the data set is, if not where the config says.
      allowed: Packages that names in the checkpoint may be imported from.
      timing: How times are measured, where something asks for them.

    Attributes:
      saved: The checkpoint.
      task: What it was trained for.
      cost: What the low-rank model costs.
      ranks: Active rank of each layer.
      timing: As given.
      scored: The rank vectors that a context has scored, with minus their loss.
    """

    def __init__(
        self,
        step: Path,
        data_dir: str | None,
        allowed: Sequence[str],
        timing: Timing | None = None,
    ):
        with errors.at("--checkpoint"):
            with logs.stage(f"reading {step}"):
                self.saved = checkpoint.open_checkpoint(step)
            self._stored = abstract_checkpoint_model(self.saved, allow_imports=allowed)
        self._data_dir, self._allowed = data_dir, allowed
        self.timing = timing or Timing()
        self.scored: list[tuple[Ranks, float]] = []
        self._dense = not self.saved.metadata["ranks"]
        self._structure = self._stored
        if self._dense:
            self._structure = nnx.eval_shape(self._factorized, self._stored)
        self.task = checkpoint_task(self.saved, allow_imports=allowed)
        self.cost = self.cost_of(self._structure)
        limits = active.rank_limits(self._structure)
        self.ranks = {path: at.active for path, at in limits.items()}
        self.ranks |= self.saved.metadata["ranks"]

    @functools.cached_property
    def run(self) -> Run:
        """What it is about, with its data."""
        return open_checkpoint_run(
            self.saved, data_dir=self._data_dir, allow_imports=self._allowed
        )

    @functools.cached_property
    def whole(self) -> nnx.Module:
        """The low-rank model at its own ranks."""
        stored = checkpoint.load(self.saved, self._stored)
        return self._factorized(stored) if self._dense else stored

    @functools.cached_property
    def dense(self) -> nnx.Module:
        """The dense model at its own ranks, which times are a share of."""
        return surgery.merge(self.whole)

    @functools.cached_property
    def times(self) -> ModelTimes:
        """How long the model takes as a function of its ranks."""
        return self.timing.times(self.whole, self.inputs)

    @functools.cached_property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The model's inputs for one example."""
        return example_inputs(self.task, self.saved.metadata["facts"])

    def cost_of(self, model: nnx.Module) -> counting.ModelCost:
        """Counts a model for one unit of the task."""
        return model_cost(model, self.task)

    def check(self, ranks: Ranks) -> None:
        """Raises UserError for ranks that the model cannot be cut to, as of another
        form."""
        limits = active.rank_limits(self._structure)
        check_lower(
            ranks,
            {
                path: limits[path]._replace(active=rank)
                for path, rank in self.ranks.items()
            },
        )

    def at(self, ranks: Ranks) -> nnx.Module:
        """Loads the model cut to some ranks; no more is read than is kept."""
        with logs.stage("cutting the model"):
            if self._dense:
                return surgery.truncate(self.whole, ranks)
            ranks = {**self.ranks, **ranks}
            return checkpoint.load(self.saved, self._stored, ranks=ranks)

    def outline(self, ranks: Ranks) -> nnx.Module:
        """Returns the model cut to some ranks without its arrays; nothing is read."""
        return nnx.eval_shape(
            lambda model: surgery.truncate(model, ranks), self._structure
        )

    def layer_by_layer(
        self, curve: Callable[[Mapping[str, Factors]], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns a curve of each layer's factors.

        No more than one layer is in memory at a time; of a dense checkpoint all are.

        Args:
          curve: From factors by path, which it must not keep, as `curves` has them.
        """
        if self._dense:
            return curve(paths.find_factors(self.whole))
        found: dict[str, np.ndarray] = {}
        for path in paths.find_factors(self._stored):
            factors = checkpoint.load_layer(self.saved, self._stored, path)
            found |= curve({path: factors})
            for array in jax.tree.leaves(nnx.state(factors)):
                array.delete()  # Flax has it in a cycle, until Python collects those
        return found

    def recalibrated(self, model: nnx.Module, batches: int) -> nnx.Module:
        """Re-estimates BatchNorm on training batches; with none it says that the
        statistics stay those of the larger model."""
        if not batches:
            if (
                calibration.has_batch_norm(model)
                and active.get_ranks(model) != self.ranks
            ):
                logs.say(
                    "BatchNorm keeps the statistics of the model that is cut;"
                    " --recalibrate re-estimates them on training data"
                )
            return model
        run = self.run
        return calibration.recalibrate_batch_norm(
            run.placement.put_model(model),
            run.training_batches(batches),
            lambda model, batch: model(*run.task.inputs(batch, None)),
        )

    def context(self) -> Context:
        """What a selector may look at; the weights and the data are read when it
        does."""
        return Context(
            self.ranks,
            self.cost,
            lambda: self._importances,
            lambda: self._spectra,
            self._scores,
            paths.find_aliases(self._structure),
            () if self._dense else family_of(self.saved),
            lambda: self.times,
            lambda: self._output_losses,
        )

    def _scores(self, candidates: Sequence[Ranks]) -> list[float]:
        found = self._scorer(candidates)
        self.scored += zip(candidates, found, strict=True)
        return found

    @functools.cached_property
    def _scorer(self) -> Score:
        return scoring.make_score(self._placed, self.run)

    @functools.cached_property
    def _output_losses(self) -> Errors:
        return scoring.output_losses(self._placed, self.run)

    @property
    def _placed(self) -> nnx.Module:
        """The whole model where the run has its arrays."""
        return self.run.placement.put_model(self.whole)

    @functools.cached_property
    def _importances(self) -> dict[str, np.ndarray]:
        return self.layer_by_layer(curves.column_importances)

    @functools.cached_property
    def _spectra(self) -> dict[str, np.ndarray]:
        return self.layer_by_layer(curves.singular_values)

    def _factorized(self, model: nnx.Module) -> nnx.Module:
        with errors.at("--checkpoint"):
            return factorization.factorize(model, _FACTORIZED)
