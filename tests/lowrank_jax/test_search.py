"""Beam search over ranks, against every rank vector there is."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.selection.search import beam_search, local_search

SIZES = {"a": (9, 14, 1), "b": (10, 7, 9), "c": (12, 12, 4), "d": (5, 20, 1)}
"""Rows, columns, and how often each of the two factors is multiplied by."""
COSTS = {p: LayerCost(i, o, 1, n, n, n) for p, (i, o, n) in SIZES.items()}
LIMITS = {path: min(i, o) for path, (i, o, _) in SIZES.items()}
EVERY_STEP = 100_000  # to save less than any rank does
NO_LIMIT = 100_000


def cost(ranks: Mapping[str, int], measure: str = "params") -> int:
    """By hand: the smaller form of each layer."""
    total = 0
    for path, rank in ranks.items():
        i, o, positions = SIZES[path]
        total += min(i * o, rank * (i + o)) * (positions if measure == "macs" else 1)
    return total


def dense(paths, measure: str) -> int:
    return cost({path: 10**6 for path in paths}, measure)


class Score:
    """A score of single rank vectors, in batches, that remembers what it saw."""

    def __init__(self, function: Callable[[Mapping[str, Any]], float]):
        self.function = function
        self.levels: list[list[Mapping[str, Any]]] = []

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> list[float]:
        self.levels.append(list(batch))
        return [self.function(ranks) for ranks in batch]


def rising(seed: int) -> Callable[[Mapping[str, int]], float]:
    """A random score that is better at higher ranks, with interactions: the sum of
    positive numbers over the box below the ranks."""
    numbers = np.random.default_rng(seed).exponential(size=tuple(LIMITS.values()))
    for axis in range(numbers.ndim):
        numbers = np.cumsum(numbers, axis)

    def score(ranks: Mapping[str, int]) -> float:
        index = [ranks.get(path, 1) - 1 for path in LIMITS]
        return float(numbers[tuple(index)])

    return score


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("fraction", [0.45, 0.6, 0.9])
@pytest.mark.parametrize("paths", ["abc", "abcd"])
def test_without_a_limit_it_is_exhaustive(paths, fraction, measure):
    """The best of all vectors within the budget, for a score that rises with ranks."""
    costs, limits = ({p: x[p] for p in paths} for x in (COSTS, LIMITS))
    every = [
        dict(zip(paths, ranks, strict=True))
        for ranks in itertools.product(*(range(1, r + 1) for r in limits.values()))
    ]
    budget = fraction * dense(paths, measure)
    within = [ranks for ranks in every if cost(ranks, measure) <= budget]
    assert 1 < len(within) < len(every)
    for seed in range(4):
        score = rising(seed)
        found = beam_search(
            Score(score),
            costs,
            limits,
            fraction,
            measure=measure,
            width=NO_LIMIT,
            steps=EVERY_STEP,
        )
        assert found in within
        assert score(found) == max(map(score, within))


def greedy(score, paths, budget: float, steps: int) -> dict[str, int]:
    """Lower one layer, the one that hurts least, until the budget is met."""
    ranks = {path: LIMITS[path] for path in paths}
    step = (cost(ranks) - budget) / steps
    while cost(ranks) > budget:
        most = {path: cost(ranks) - cost({**ranks, path: 1}) for path in paths}
        due = {path: min(step, most[path] / 2, cost(ranks) - budget) for path in paths}
        children = []
        for path in paths:
            child = dict(ranks)
            while child[path] > 1 and cost(ranks) - cost(child) < due[path]:
                child[path] -= 1
            if child[path] < ranks[path] and 4 * due[path] >= max(due.values()) > 0:
                children.append(child)
        ranks = max(children, key=score)
    return ranks


def test_many_layers_are_lowered_step_by_step():
    """No layer alone can save what a step asks for, and none falls to 1 at once."""
    costs = {f"layer{n}": LayerCost(64, 64, 1, 1, 1, 1) for n in range(20)}
    limits = dict.fromkeys(costs, 64)

    def score(ranks: Mapping[str, int]) -> float:
        return -sum(1 / rank for rank in ranks.values())

    def scores(candidates: list[dict[str, int]]) -> list[float]:
        return [score(ranks) for ranks in candidates]

    found = beam_search(scores, costs, limits, 0.5, width=1, steps=5)
    assert set(found.values()) == {16}  # half of what each can save, and the budget


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, EVERY_STEP])
def test_one_layer_stops_at_the_largest_rank_within_the_budget(steps):
    """However coarse the steps: of 64 x 64 half are 16 ranks of 128 numbers."""
    costs = {"a": LayerCost(64, 64, 1, 1, 1, 1)}
    for fraction, rank in ((0.5, 16), (0.51, 16), (0.9, 28), (0.1, 3)):
        score = Score(lambda ranks: ranks["a"])
        found = beam_search(score, costs, {"a": 64}, fraction, width=1, steps=steps)
        assert found == {"a": rank}


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_no_answer_leaves_room_in_every_layer(steps):
    """It is the child of a state over the budget: one rank more in the layer that was
    lowered last goes over it."""
    for seed in range(4):
        score = Score(rising(seed))
        found = beam_search(score, COSTS, LIMITS, 0.6, width=2, steps=steps)
        budget = 0.6 * dense(LIMITS, "params")
        raised = [{**found, path: found[path] + 1} for path in LIMITS]
        assert any(cost(ranks) > budget for ranks in raised)


@pytest.mark.parametrize("steps", [1, 3, 20, EVERY_STEP])
@pytest.mark.parametrize("fraction", [0.45, 0.6, 0.9])
def test_with_one_state_it_is_greedy(fraction, steps):
    """By a loop written here; each level is scored at once, and lowers one layer of
    one state by what saves a step."""
    for seed in range(4):
        score = Score(rising(seed))
        found = beam_search(score, COSTS, LIMITS, fraction, width=1, steps=steps)
        budget = fraction * dense(LIMITS, "params")
        assert found == greedy(rising(seed), LIMITS, budget, steps)
        assert all(len(level) <= len(LIMITS) for level in score.levels)
        if steps == 1:
            assert len(score.levels) <= 3 * len(LIMITS)


@pytest.mark.parametrize("width", [1, 2, 5, NO_LIMIT])
@pytest.mark.parametrize("steps", [1, 4, EVERY_STEP])
@pytest.mark.parametrize("measure", ["params", "macs"])
def test_the_budget_is_kept(width, steps, measure):
    """By any path to it, down to the least budget; no rank is 0 or above its limit."""
    least = cost(dict.fromkeys(LIMITS, 1), measure) / dense(LIMITS, measure)
    for fraction in (least, 0.5, 0.7, 0.99):
        score = Score(rising(1))
        found = beam_search(
            score, COSTS, LIMITS, fraction, measure=measure, width=width, steps=steps
        )
        assert cost(found, measure) <= fraction * dense(LIMITS, measure)
        assert all(1 <= found[path] <= LIMITS[path] for path in LIMITS)
        for level in score.levels:
            assert len({str(ranks) for ranks in level}) == len(level) > 0
    ones = beam_search(
        Score(rising(1)), COSTS, LIMITS, least, measure=measure, steps=steps
    )
    assert cost(ones, measure) == cost(dict.fromkeys(LIMITS, 1), measure)


def test_a_wider_beam_finds_what_greed_misses():
    """Of one pair of layers the first rank is the dearest and the third comes for
    nothing; greed starts with the other pair, and never gets there."""
    costs = {path: LayerCost(8, 8, 1, 1, 1, 1) for path in "abcd"}
    limits = dict.fromkeys("abcd", 3)

    def score(ranks: Mapping[str, int]) -> float:
        lost = {path: 3 - ranks[path] for path in "abcd"}
        second = (0, 1.5, 1.6, 1.0, 1.2)[lost["c"] + lost["d"]]
        return -float(lost["a"] + lost["b"]) - second

    fraction = 9 * 16 / (4 * 64)  # three ranks of twelve must go
    every = [
        dict(zip("abcd", ranks, strict=True))
        for ranks in itertools.product((1, 2, 3), repeat=4)
        if sum(ranks) <= 9
    ]
    best = max(map(score, every))
    found = {
        width: beam_search(
            Score(score), costs, limits, fraction, width=width, steps=EVERY_STEP
        )
        for width in (1, 4)
    }
    assert score(found[1]) == -3
    assert score(found[4]) == best == -1
    assert sum(found[4].values()) == sum(found[1].values()) == 9


def test_a_budget_that_is_met_asks_for_nothing():
    """The start comes back, lower than allocated or not, and nothing is scored."""

    def never(batch):
        raise AssertionError("scored")

    assert beam_search(never, COSTS, LIMITS, 1.0) == LIMITS
    small = dict.fromkeys(LIMITS, 1)
    assert beam_search(never, COSTS, small, 0.9) == small
    assert beam_search(never, {}, {}, 0.5) == {}


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_a_budget_below_rank_one_is_refused(measure):
    """With the least that can be reached, which then is."""
    least = cost(dict.fromkeys(LIMITS, 1), measure) / dense(LIMITS, measure)
    with pytest.raises(ValueError, match=f"^{measure}_fraction: .*{least:.4g}.*0.05"):
        beam_search(Score(rising(0)), COSTS, LIMITS, 0.05, measure=measure)


@pytest.mark.parametrize("options", [{"width": 0}, {"steps": 0}, {"width": -1}])
def test_widths_and_steps_below_one_are_refused(options):
    with pytest.raises(ValueError, match="^width and steps: must be at least 1"):
        beam_search(Score(rising(0)), COSTS, LIMITS, 0.5, **options)


def test_stacked_ranks_go_down_together():
    """One cap for all layers of a stack; those below it stay, rank 0 too."""
    costs = {
        "stack": LayerCost(8, 8, 3, 1, 1, 1),
        "one": LayerCost(8, 8, 1, 1, 1, 1),
    }
    limits = {"stack": [4, 2, 0], "one": 4}

    def score(ranks):
        return 3 * sum(ranks["stack"]) + ranks["one"]

    seen = Score(score)
    budget = 5 / 16  # 20 * 16 parameters of 4 * 64 are 80: five ranks of ten
    found = beam_search(seen, costs, limits, budget, width=NO_LIMIT, steps=EVERY_STEP)
    assert found == {"stack": [2, 2, 0], "one": 1}
    assert all(type(rank) is int for rank in (*found["stack"], found["one"]))
    caps = [[min(limit, cap) for limit in limits["stack"]] for cap in (1, 2, 3, 4)]
    states = [ranks for level in seen.levels for ranks in level]
    assert len(states) > 6 and all(ranks["stack"] in caps for ranks in states)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_scores_that_are_not_a_number_lose(width):
    """A model that is cut too far may overflow; it is not the best for that."""
    search = functools.partial(
        beam_search, costs=COSTS, max_ranks=LIMITS, fraction=0.6, width=width
    )
    best = search(Score(rising(0)))
    lowered = [path for path in LIMITS if best[path] < LIMITS[path]]
    for path in lowered:

        def score(ranks, path=path):
            lost = ranks[path] <= best[path]
            return float("nan") if lost else rising(0)(ranks)

        assert search(Score(score))[path] > best[path]
    assert lowered


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("seed", range(4))
def test_swaps_never_end_below_a_start(seed, measure):
    """Nor over the budget; and mostly above: from bad starts they come near the best
    there is, by brute force."""
    random = np.random.default_rng(seed)
    score = Score(rising(seed))
    vectors = [
        dict(zip(LIMITS, ranks, strict=True))
        for ranks in itertools.product(*[range(1, n + 1) for n in LIMITS.values()])
    ]
    for fraction in (0.4, 0.6, 0.8):
        budget = fraction * dense(LIMITS, measure)
        fitting = [one for one in vectors if cost(one, measure) <= budget]
        starts = [fitting[k] for k in random.integers(0, len(fitting), 3)]
        given = (score, COSTS, LIMITS, [*starts, LIMITS], fraction)
        found = local_search(*given, measure=measure, rounds=60)
        assert cost(found, measure) <= budget
        values = sorted(map(score.function, fitting))
        assert score.function(found) >= max(map(score.function, starts))
        assert np.searchsorted(values, score.function(found)) >= 0.95 * len(values)
        none = local_search(*given, measure=measure, rounds=0)
        assert none == max(starts, key=score.function)


def test_swaps_move_stacks_together_and_refuse_no_start():
    costs = {"a": LayerCost(12, 12, 2, 1, 1, 1), "b": LayerCost(12, 12, 1, 1, 1, 1)}
    limits = {"a": [12, 6], "b": 12}
    starts = [{"a": [1, 1], "b": 3}]

    def score(batch):
        return [sum(ranks["a"]) for ranks in batch]

    found = local_search(score, costs, limits, starts, 0.5, measure="params")
    assert found["b"] == 1 and sum(found["a"]) > 2
    assert found["a"][0] <= 12 and found["a"][1] <= 6
    with pytest.raises(UserError, match="^starts: must have one within the budget"):
        local_search(score, costs, limits, [limits], 0.5, measure="params")
