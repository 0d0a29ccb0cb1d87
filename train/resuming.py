"""Going on from the latest checkpoint that is whole."""

from collections.abc import Sequence
from pathlib import Path

from lowrank_jax import checkpoint
from train import workdirs
from train.model import check_facts, load_model
from train.opening import first_whole
from train.phases import Phase
from train.report import description
from train.run import Run
from train.session import Session


def resume(
    run: Run, plan: Sequence[Phase], steps: Sequence[Path]
) -> tuple[Session, checkpoint.Saved]:
    """Returns the session of the latest checkpoint that is whole, and that checkpoint.

    Damaged ones are named and set aside, so that their steps can be saved again.

    Args:
      run: What the run is about.
      plan: Its phases.
      steps: The checkpoints, the latest first.

    Raises:
      DamagedCheckpoint: None is whole.
      UserError: They are of another version, or of other data.
    """

    def begin(step: Path) -> tuple[Session, checkpoint.Saved]:
        with description.reading(step):
            saved = checkpoint.open_checkpoint(step)
            check_facts(saved, run.data.facts)
            model = load_model(saved, allow_imports=None, placement=run.placement)
        description.describe(run, plan, model, saved.step)
        return Session(run, plan, model, saved), saved

    session, saved = first_whole(steps, begin)
    workdirs.set_aside(steps[: steps.index(saved.path)])
    return session, saved
