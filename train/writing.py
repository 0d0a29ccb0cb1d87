"""A checkpoint opened to write text with it: its model, at its ranks or lower ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from lowrank_jax import active, counting, errors, surgery
from lowrank_jax.errors import UserError
from lowrank_jax.selection import choosing
from train import opening, selecting
from train.generation import generate
from train.model import about, checkpoint_task, family_of, model_cost
from train.report import logs
from train.tasks.base import Generation


class Writer(NamedTuple):
    """A model that writes.

    Args:
      model: Cut to the ranks that were asked for.
      generation: How it writes.
      cost: What it costs, MACs for a token.
    """

    model: nnx.Module
    generation: Generation
    cost: counting.ModelCost

    def write(self, prompts: Sequence[str], **how: Any) -> dict[str, Any]:
        """Returns what is written after each prompt, with what the model is.

        Args:
          prompts: The prompts.
          **how: As for `train.generation.generate`.

        Returns:
          "texts", "ranks", "params", "stored" and "macs".
        """
        ranks = active.get_ranks(self.model)
        with logs.stage(f"compiling, then writing {len(prompts):,} texts"):
            texts = generate(self.model, self.generation, prompts, **how)
        return {
            "texts": texts,
            "ranks": ranks,
            "params": self.cost.params(ranks),
            "stored": self.cost.allocated,
            "macs": self.cost.macs(ranks),
        }


def open_writer(
    path: str | Path,
    selector: Mapping[str, Any] | None = None,
    *,
    allow_imports: Sequence[str] = (),
) -> Writer:
    """Opens a checkpoint to write with it; its data set is not needed.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir; a damaged checkpoint is
        named, and the one before it is taken.
      selector: Name and arguments of a selector that looks at no data; None for the
        checkpoint's ranks.
      allow_imports: Packages that names in the checkpoint may be imported from.

    Raises:
      UserError: Its task writes no text, or the ranks are none of its model's.
    """
    allowed = list(allow_imports)
    with errors.at("--checkpoint"):
        saved, model = opening.load_latest(path, allow_imports=allowed)
        task = checkpoint_task(saved, allow_imports=allowed)
        if task.generation is None:
            config, _, _ = about(saved)
            raise UserError(
                "must be of a task that writes text, on data with a tokenizer, got"
                f" {config['task']['name']} on {config['data']['name']}. Train one of"
                " language_model or translation."
            )
        missing = [n for n in task.generation.needs if not hasattr(model, n)]
        if missing:
            raise UserError(
                "must be of a model that writes token by token, got"
                f" {type(model).__name__} without {', '.join(missing)}. Add what"
                " train.models says of them, and train it."
            )
    before = active.get_ranks(model)
    if selector is not None:
        cost, family = model_cost(model, task), family_of(saved)
        context = choosing.context_of(model, cost, family=family)
        ranks = selecting.select(selector, context)
        if ranks != before:
            model = surgery.truncate(model, ranks)
    return Writer(model, task.generation, model_cost(model, task))
