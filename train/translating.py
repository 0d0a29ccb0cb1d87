"""Translations of a split by a model at any ranks, judged against their references."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax import active
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks
from train.evaluation import settable
from train.generation import generate
from train.report import logs
from train.state import Structure
from train.tasks.base import Generation, Task


def translates(task: Task) -> bool:
    """Returns whether texts of a task are written and judged."""
    how = task.generation
    return how is not None and how.pairs is not None and how.score is not None


def make_score(
    structure: Structure,
    generation: Generation,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> Callable[[Any, Any, Ranks], dict[str, float]]:
    """Makes a function from parameters, model state and ranks to figures, as BLEU.

    Texts are written greedily, the longest prompts first, so that those of a batch end
    at about the same time; other ranks do not recompile. In one process only.

    Args:
      structure: The model's structure.
      generation: How it writes.
      batches: Makes the batches that prompts and references are taken of.

    Raises:
      UserError: There are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(
            "bleu: must be counted in one process, got"
            f" {jax.process_count()}. Evaluate the checkpoint on one machine, or leave"
            " it out with --nobleu."
        )

    @functools.cache
    def pairs() -> list[tuple[str, str]]:
        found = [pair for batch in batches() for pair in generation.pairs(batch)]
        return sorted(found, key=lambda pair: len(pair[0]), reverse=True)

    def score(params: Any, model_state: Any, ranks: Ranks) -> dict[str, float]:
        model = structure.merge(params, model_state, None)
        active.set_ranks(model, settable(structure, ranks))
        prompts, references = zip(*pairs(), strict=True)
        logs.say(f"translating {len(prompts):,} sentences ...")
        texts = generate(model, generation, prompts, max_tokens=generation.limit)
        return generation.score(texts, references)

    return score
