"""What a phase runs with for the shapes at hand; compiled when it is first called."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx

from lowrank_jax import calibration
from lowrank_jax.families import Family
from lowrank_jax.ranks import Ranks
from train.evaluation import (
    Evaluator,
    Figures,
    make_calibrator,
    make_evaluator,
    sweep,
)
from train.phases import Running
from train.run import Run
from train.state import Structure, TrainState
from train.step import Step, Steps, make_train_step, make_train_steps


class Compiled(NamedTuple):
    """Steps and evaluation of a phase.

    Args:
      train_step: One for each pattern of what is trained, in turn by epoch.
      train_steps: The same, several in one call.
      evaluator: Judges the model on the validation split.
    """

    train_step: tuple[Step, ...]
    train_steps: tuple[Steps, ...]
    evaluator: Evaluator

    def frontier(
        self,
        state: TrainState,
        ranks: Ranks,
        fractions: Sequence[float],
        family: Family,
    ) -> list[Figures]:
        """Returns figures on the validation split at each of some fractions of ranks.

        Args:
          state: With the parameters.
          ranks: The model's active ranks.
          fractions: Fractions of them, in (0, 1].
          family: As of `sweep`.
        """
        values = (state.params, state.model_state)
        return sweep(self.evaluator, *values, ranks, fractions, family)


def compile_phase(
    run: Run, running: Running, structure: Structure, model: nnx.Module
) -> Compiled:
    """Makes the steps and the evaluation of a phase.

    Args:
      run: What the run is about.
      running: The phase.
      structure: Of the model.
      model: The model, to count it.
    """
    root_key = jax.random.key(run.config["seed"])
    layout = run.placement.layout(model)
    steps = tuple(
        make_train_step(
            structure,
            running,
            run.task,
            root_key,
            epoch=epoch,
            accumulation_steps=run.config["accumulation_steps"],
            compute_dtype=run.config["compute_dtype"],
            layout=layout,
        )
        for epoch in range(len(running.phase.trainable))
    )
    count, calibrate = run.config["recalibration_batches"], None
    if count and calibration.has_batch_norm(model):
        calibrate = make_calibrator(
            structure, run.task, lambda: run.training_batches(count)
        )
    evaluate = make_evaluator(structure, run.task)
    evaluator = Evaluator(
        evaluate,
        calibrate,
        run.cost(model),
        lambda: run.eval_batches("validation"),
        structure.limits,
    )
    return Compiled(steps, tuple(map(make_train_steps, steps)), evaluator)
