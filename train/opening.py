"""A checkpoint opened to judge it: its model, at its ranks or any lower ones."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from flax import nnx

from lowrank_jax import active, calibration, checkpoint, errors
from lowrank_jax.errors import DamagedCheckpoint
from lowrank_jax.families import Family
from train import evaluation, translating
from train.model import about, family_of, load_model
from train.report import logs
from train.run import Run, open_checkpoint_run
from train.sharding import Placement, any_devices
from train.state import split_model

T = TypeVar("T")


class Opened(NamedTuple):
    """A checkpoint's model with what its run was about.

    Args:
      run: Its config, task and data.
      model: The model, with its arrays.
      family: What fractions of its ranks stand for where it is not empty.
    """

    run: Run
    model: nnx.Module
    family: Family = ()

    def figures(
        self, split: str = "test", *, translate: bool = True
    ) -> evaluation.Figures:
        """Returns the figures at the checkpoint's ranks; "stored" is what it holds, the
        ranks that do not act too.

        Args:
          split: "train", "validation" or "test".
          translate: As of `evaluator`.

        Raises:
          NotFinite: The loss is NaN or infinite.
        """
        _, params, model_state = split_model(self.model)
        ranks = active.get_ranks(self.model)
        evaluator = self.evaluator(split, translate=translate)
        with self._evaluating(split):
            figures = evaluator.at(params, model_state, ranks)
        evaluation.check_finite([figures], split)
        return {**figures, "stored": evaluator.cost.allocated}

    def sweep(
        self,
        fractions: Sequence[float],
        split: str = "test",
        *,
        recalibration_batches: int = 0,
        translate: bool = True,
    ) -> list[evaluation.Figures]:
        """Returns the figures at each of some fractions of the ranks.

        Args:
          fractions: Fractions of the ranks in (0, 1].
          split: "train", "validation" or "test".
          recalibration_batches: Training batches to re-estimate BatchNorm on at each
            fraction; 0 for the statistics of the checkpoint.
          translate: As of `evaluator`.

        Raises:
          NotFinite: The loss at one of them is NaN or infinite.
        """
        _, params, model_state = split_model(self.model)
        evaluator = self.evaluator(split, recalibration_batches, translate=translate)
        ranks = active.get_ranks(self.model)
        values = (params, model_state)
        with self._evaluating(split):
            rows = evaluation.sweep(evaluator, *values, ranks, fractions, self.family)
        evaluation.check_finite(rows, split)
        return rows

    def _evaluating(self, split: str) -> contextlib.AbstractContextManager[None]:
        count = self.run.data.sizes[split]
        return logs.stage(f"compiling, then evaluating {count:,} {split} examples")

    def evaluator(
        self, split: str, batches: int = 0, *, translate: bool = True
    ) -> evaluation.Evaluator:
        """Makes what judges the model at any ranks.

        Args:
          split: "train", "validation" or "test".
          batches: Training batches to re-estimate BatchNorm on, 0 for none.
          translate: Whether a model whose task is to translate does so, greedily, and
            is judged by what it writes as well.
        """
        run, (structure, _, _) = self.run, split_model(self.model)
        calibrate, score = None, None
        if batches and calibration.has_batch_norm(self.model):
            calibrate = evaluation.make_calibrator(
                structure, run.task, lambda: run.training_batches(batches)
            )
        if translate and translating.translates(run.task):
            score = translating.make_score(
                structure, run.task.generation, lambda: run.host_batches(split)
            )
        return evaluation.Evaluator(
            evaluation.make_evaluator(structure, run.task),
            calibrate,
            run.cost(self.model),
            lambda: run.eval_batches(split),
            structure.limits,
            score,
        )


def open_model(
    path: str | Path,
    *,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> Opened:
    """Opens a checkpoint to evaluate it.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.
    """
    allowed = list(allow_imports)
    with errors.at("--checkpoint"):
        saved, model = load_latest(path, allow_imports=allowed)
    run = open_checkpoint_run(saved, data_dir=data_dir, allow_imports=allowed)
    return Opened(run, model, family_of(saved))


def load_latest(
    path: str | Path,
    *,
    allow_imports: Sequence[str] | None,
    placement: Placement | None = None,
) -> tuple[checkpoint.Saved, nnx.Module]:
    """Loads the model of the latest checkpoint that is whole.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      allow_imports: Packages that names in the checkpoint may be imported from, None
        for all.
      placement: Where its arrays shall lie; None for the mesh it was trained on or,
        where that does not fit, what devices there are.

    Raises:
      DamagedCheckpoint: None is whole.
      UserError: It was written by something else.
    """

    def load(step: Path) -> tuple[checkpoint.Saved, nnx.Module]:
        saved = checkpoint.open_checkpoint(step)
        config, _, _ = about(saved)
        place = placement or any_devices(config["mesh"])
        with logs.stage(f"reading {saved.path}"):
            model = load_model(saved, allow_imports=allow_imports, placement=place)
        return saved, model

    return first_whole(checkpoint.complete_steps(path) or [Path(path)], load)


def first_whole(steps: Sequence[Path], use: Callable[[Path], T]) -> T:
    """Returns what comes of the first checkpoint that is not damaged.

    Damaged ones are named.

    Args:
      steps: Checkpoints, the latest first.
      use: What is made of one.

    Raises:
      DamagedCheckpoint: None is whole.
    """
    damaged: list[DamagedCheckpoint] = []
    for step in steps:
        try:
            return use(step)
        except DamagedCheckpoint as error:
            damaged.append(error)
            logs.say(f"skipped: {error}")
    raise damaged[0]
