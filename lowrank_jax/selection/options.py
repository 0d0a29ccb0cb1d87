"""What a solver chooses from: for each matrix the ranks it may have, what they cost,
and what they lose."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.ranks import Ranks, flatten_rank
from lowrank_jax.selection.budgets import Costs
from lowrank_jax.selection.tails import Errors


class Options(NamedTuple):
    """The ranks that one matrix may have.

    Args:
      ranks: From low to high; the last is the active one.
      costs: Of each.
      errors: Of each, falling.
    """

    ranks: Int[np.ndarray, " n"]
    costs: Float[np.ndarray, " n"]
    errors: Float[np.ndarray, " n"]


class Profiles(NamedTuple):
    """Several choices for all matrices.

    Args:
      options: The number of the option of each matrix.
      costs: Of each choice.
      errors: Of each choice.
    """

    options: Int[np.ndarray, "n m"]
    costs: Float[np.ndarray, " n"]
    errors: Float[np.ndarray, " n"]


def list_options(
    costs: Costs,
    max_ranks: Ranks,
    errors: Errors,
    measure: str,
    *,
    multiple_of: int = 1,
) -> list[Options]:
    """Lists the options of all matrices, layer by layer: ranks of 1 and more, or 0
    where a matrix has no more.

    Args:
      costs: Cost of each layer.
      max_ranks: Active ranks.
      errors: What each rank loses.
      measure: "params", "macs" or "latency".
      multiple_of: Leave out ranks that are no multiple of it, but for the active one,
        and where that one is lower.

    Raises:
      UserError: `multiple_of` is below 1.
    """
    if multiple_of < 1:
        raise UserError(
            f"multiple_of: must be at least 1, got {multiple_of}. Raise it."
        )
    found = []
    for path, rank in max_ranks.items():
        flat = flatten_rank(rank)
        cost = costs[path]
        table: dict[int, float] = {}
        for active, curve in zip(flat, errors[path], strict=True):
            step = multiple_of if multiple_of <= active else 1
            ranks = np.arange(step, active + 1, step)
            if not active or active % step:
                ranks = np.append(ranks, active)
            for number in map(int, ranks):
                if number not in table:
                    # of one matrix: all of a layer cost the same at the same rank
                    table[number] = getattr(cost, measure)(number) / len(flat)
            values = np.array([table[int(number)] for number in ranks])
            found.append(Options(ranks, values, curve[ranks]))
    return found


def as_ranks(max_ranks: Ranks, chosen: Sequence[int]) -> dict[str, Any]:
    """Returns ranks by path from one number for each matrix, in the order of
    `list_options`."""
    result, start = {}, 0
    for path, rank in max_ranks.items():
        count = np.size(rank)
        numbers = np.array(chosen[start : start + count], int)
        result[path], start = numbers.reshape(np.shape(rank)).tolist(), start + count
    return result


def ranks_at(table: Sequence[Options], chosen: Sequence[int]) -> list[int]:
    """Returns the rank of each matrix from the number of its option."""
    return [int(one.ranks[at]) for one, at in zip(table, chosen, strict=True)]


def all_fit(table: Sequence[Options], budget: float) -> bool:
    """Returns whether the active ranks of all matrices are within a budget."""
    return sum(one.costs[-1] for one in table) <= budget


def check_least(table: Sequence[Options], budget: float, multiple_of: int) -> None:
    """Raises SmallBudget where the cheapest options of all matrices exceed a budget."""
    least = sum(one.costs.min() for one in table)
    if least > budget:
        raise SmallBudget(
            f"multiple_of: must leave ranks that fit the budget, got {multiple_of}, at"
            f" which {least:.4g} is the least for {budget:.4g}. Lower it, or raise the"
            " budget."
        )
