"""How good rank vectors are, for searches: minus the loss on held-out examples."""

from collections.abc import Callable, Sequence

from flax import nnx

from lowrank_jax.ranks import Ranks
from train import evaluation
from train.report.searches import SearchProgress
from train.run import Run
from train.state import split_model


def make_score(model: nnx.Module, run: Run) -> Callable[[Sequence[Ranks]], list[float]]:
    """Makes a function that scores rank vectors by minus the loss on held-out examples.

    The model is normalized by the batches' own statistics. One compilation serves all
    rank vectors.

    Args:
      model: The model to score.
      run: What it is about: `config.scoring_batches` validation batches are used.
    """
    structure, params, model_state = split_model(model)
    evaluate = evaluation.make_evaluator(structure, run.task, batch_statistics=True)
    batches = run.scoring_batches()

    progress = SearchProgress()

    def score(candidates: Sequence[Ranks]) -> list[float]:
        scores = []
        for ranks in candidates:
            polled = run.stop.polled(batches)
            scores.append(-evaluate(params, model_state, ranks, polled)["loss"])
            progress.scored(scores[-1])
        return scores

    return score
