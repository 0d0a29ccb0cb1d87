"""Search for ranks with the real loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, largest, lowest
from lowrank_jax.selection.budgets import Costs, check_budget, total_cost


def beam_search(
    score: Callable[[Sequence[Ranks]], list[float]],
    costs: Costs,
    max_ranks: Ranks,
    fraction: float,
    *,
    measure: str = "params",
    width: int = 4,
    steps: int = 20,
) -> dict[str, Any]:
    """Chooses all ranks jointly for one budget, by beam search on the loss.

    A state is a rank for every layer; a child lowers one layer by as little as saves
    `1 / steps` of what has to go (less in small layers), so that children are compared
    at about equal cost, and by no more than meets the budget. The best `width` states
    of a level stay; a state within the budget is done. Our reading of the modified beam
    search of BSR (Eo et al., 2021), whose details are not public. With every rank as a
    step and no limit on the width this is exhaustive over what the budget just allows;
    with `width=1` it is greedy.

    Args:
      score: Scores of rank vectors, higher is better, NaN worst; called once a level.
      costs: Cost of each layer.
      max_ranks: Ranks to start from; the layers of a stack are lowered together.
      fraction: Budget as a share, in (0, 1], of what the layers cost when dense.
      measure: "params", "macs" or "latency".
      width: States to keep.
      steps: How finely the way to the budget is divided.

    Raises:
      UserError: An argument out of bounds, or a budget that rank 1 everywhere exceeds.
    """
    if width < 1 or steps < 1:
        raise UserError(
            f"width and steps: must be at least 1, got {width} and {steps}. Raise them."
        )
    budget = check_budget(costs, max_ranks, fraction, measure)
    start = dict(max_ranks)
    step = (total_cost(costs, start, measure) - budget) / steps
    if step <= 0:
        return start
    frontier: list[Ranks] = [start]
    done: dict[str, tuple[float, Ranks]] = {}
    while frontier:
        # Every way to lower one layer of one state, each rank vector once.
        children = _unique(
            child
            for ranks in frontier
            for child in _children(ranks, costs, measure, budget, step)
        )
        # The best stay: those within the budget as answers, the others to go on from.
        frontier = []
        for value, ranks in _best(score(children), children)[:width]:
            if total_cost(costs, ranks, measure) <= budget:
                done[_key(ranks)] = (value, ranks)
            else:
                frontier.append(ranks)
    return dict(max(done.values(), key=lambda pair: pair[0])[1])


def local_search(
    score: Callable[[Sequence[Ranks]], list[float]],
    costs: Costs,
    max_ranks: Ranks,
    starts: Sequence[Ranks],
    fraction: float,
    *,
    measure: str = "params",
    rounds: int = 20,
    steps: int = 8,
) -> dict[str, Any]:
    """Goes from the best of several rank vectors to better ones by swaps of cost.

    A neighbour raises one layer and lowers another until the budget is met, or raises
    one where there is room. The best neighbour comes next; where none is better, less
    is swapped. What it returns scores no worse than any of the starts.

    Args:
      score: As of `beam_search`; called once a round.
      costs: As of `beam_search`.
      max_ranks: Ranks that are not exceeded.
      starts: Rank vectors to begin with; those over the budget are left out.
      fraction: As of `beam_search`.
      measure: As of `beam_search`.
      rounds: How often neighbours are scored, at most.
      steps: The first swaps are of the budget divided by it, later ones of half.

    Raises:
      UserError: As `beam_search`, or no start is within the budget.
    """
    if rounds < 0 or steps < 1:
        raise UserError(
            f"rounds, steps: must be at least 0 and 1, got {rounds} and {steps}. Raise"
            " them."
        )
    budget = check_budget(costs, max_ranks, fraction, measure)
    if total_cost(costs, max_ranks, measure) <= budget:
        return dict(max_ranks)
    fitting = _unique(
        ranks for ranks in starts if total_cost(costs, ranks, measure) <= budget
    )
    if not fitting:
        raise UserError(
            f"starts: must have one within the budget, got {list(starts)}. Add one."
        )
    value, ranks = _best(score(fitting), fitting)[0]
    seen = {_key(one) for one in fitting}
    amount = budget / steps
    for _ in range(rounds):
        near = _unique(_swaps(ranks, max_ranks, costs, measure, budget, amount))
        near = [one for one in near if _key(one) not in seen]
        seen |= {_key(one) for one in near}
        reached, best = _best(score(near), near)[0] if near else (value, ranks)
        if reached > value:
            value, ranks = reached, best
        elif amount < 1:
            break
        else:
            amount /= 2
    return dict(ranks)


def _swaps(
    ranks: Ranks,
    max_ranks: Ranks,
    costs: Costs,
    measure: str,
    budget: float,
    amount: float,
) -> Iterator[dict[str, Any]]:
    """The neighbours of a rank vector: one layer dearer by about an amount, another
    cheaper by what that takes."""
    for path, rank in ranks.items():
        before = getattr(costs[path], measure)(rank)
        for step in range(1, largest(max_ranks[path]) + 1):
            raised = lowest(np.add(rank, step), max_ranks[path])
            if getattr(costs[path], measure)(raised) - before >= amount:
                break
        else:
            raised = max_ranks[path]
        if np.array_equal(raised, rank):
            continue
        dearer = {**ranks, path: raised}
        over = total_cost(costs, dearer, measure) - budget
        if over <= 0:
            yield dearer
            continue
        for other, current in ranks.items():
            if other == path:
                continue
            at = getattr(costs[other], measure)(current)
            for step in range(1, largest(current)):
                lowered = np.maximum(np.subtract(current, step), np.minimum(current, 1))
                cheaper = getattr(costs[other], measure)(lowered.tolist())
                if at - cheaper >= over:
                    yield {**dearer, other: lowered.tolist()}
                    break


def _best(
    scores: Sequence[float], children: Sequence[Ranks]
) -> list[tuple[float, Ranks]]:
    """Pairs scores with their rank vectors, the highest first, NaN last."""
    comparable = [-math.inf if math.isnan(score) else score for score in scores]
    pairs = zip(comparable, children, strict=True)
    return sorted(pairs, key=lambda pair: pair[0], reverse=True)


def _children(
    ranks: Ranks,
    costs: Costs,
    measure: str,
    budget: float,
    step: float,
) -> list[dict[str, Any]]:
    """Lowers one layer in each child, by the least that saves enough.

    Enough is a step, or half of what the layer can still save, if that is less, or what
    is missing to the budget, if that is less still; so no child goes below the budget
    where a larger rank meets it. Layers that would save less than a quarter of the
    others wait.
    """
    missing = total_cost(costs, ranks, measure) - budget
    before = {p: total_cost(costs, {p: rank}, measure) for p, rank in ranks.items()}
    enough = {}
    for path, rank in ranks.items():
        least = total_cost(costs, {path: lowest(rank, 1)}, measure)
        if before[path] > least:
            enough[path] = min(step, (before[path] - least) / 2, missing)
    most = max(enough.values(), default=0)
    children = []
    for path, wanted in enough.items():
        if wanted < most / 4:
            continue
        for cap in range(largest(ranks[path]) - 1, 0, -1):
            lowered = lowest(ranks[path], cap)
            if before[path] - total_cost(costs, {path: lowered}, measure) >= wanted:
                children.append({**ranks, path: lowered})
                break
    return children


def _unique(states: Any) -> list[dict[str, Any]]:
    return list({_key(ranks): ranks for ranks in states}.values())


def _key(ranks: Ranks) -> str:
    return str(sorted(ranks.items()))
