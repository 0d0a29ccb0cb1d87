"""Ranks of the least sum of errors, and nested chains of them, against every choice
there is."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import at_fraction
from lowrank_jax.selection import budgets, hull, knapsack, options, solvers, tails
from lowrank_jax.selection.options import Options
from lowrank_jax.selection.tails import list_errors

COSTS = {
    "a": LayerCost(6, 9, 1, 4, 4, 4),
    "b": LayerCost(5, 5, 2, 1, 1, 1),
    "c": LayerCost(4, 30, 1, 2, 2, 2),
}
LIMITS = {"a": 6, "b": [5, 4], "c": 3}
RANDOM = np.random.default_rng(0)
IMPORTANCES = {
    "a": np.sort(RANDOM.exponential(size=6))[::-1],
    "b": np.sort(RANDOM.exponential(size=(2, 5)), axis=-1)[:, ::-1],
    "c": RANDOM.exponential(size=4),
}
SHARES = (0.35, 0.45, 0.6, 0.8, 0.97)


def table(seed: int, sizes: Sequence[int]) -> list[Options]:
    """Random options: costs that rise, errors that fall to 0."""
    random = np.random.default_rng(seed)
    found = []
    for count in sizes:
        costs = np.cumsum(random.integers(1, 9, count)).astype(float)
        errors = np.cumsum(random.exponential(size=count))[::-1] - 0
        found.append(Options(np.arange(1, count + 1), costs, errors - errors[-1]))
    return found


def every_choice(
    given: Sequence[Options],
) -> list[tuple[tuple[int, ...], float, float]]:
    """All choices with their cost and error, summed in Python."""
    numbers = itertools.product(*[range(len(one.ranks)) for one in given])
    return [
        (
            chosen,
            sum(float(one.costs[k]) for one, k in zip(given, chosen, strict=True)),
            sum(float(one.errors[k]) for one, k in zip(given, chosen, strict=True)),
        )
        for chosen in numbers
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_equals_brute_force(seed):
    """At every budget; below the least of all it says so."""
    given = table(seed, (5, 3, 1, 6))
    choices = every_choice(given)
    least = min(cost for _, cost, _ in choices)
    for budget in np.linspace(least, max(cost for _, cost, _ in choices), 17):
        chosen = tuple(knapsack.solve(given, budget))
        (found,) = [one for one in choices if one[0] == chosen]
        best = min(error for _, cost, error in choices if cost <= budget)
        assert found[1] <= budget and found[2] == pytest.approx(best)
    with pytest.raises(UserError, match="^budget: must be at least what the lowest"):
        knapsack.solve(given, least - 1)


def test_a_knapsack_of_too_many_states_is_within_a_percent():
    """And never over the budget: costs are those of the ranks, only states are few."""
    given = table(0, (40,) * 12)
    lowest, full = (sum(one.costs[at] for one in given) for at in (0, -1))
    for budget in np.linspace(1.05 * lowest, full, 9):
        few, many = (
            knapsack.solve(given, budget, states=states) for states in (512, 100_000)
        )
        errors = []
        for chosen in (few, many):
            picked = list(zip(given, chosen, strict=True))
            assert sum(one.costs[k] for one, k in picked) <= budget
            errors.append(sum(one.errors[k] for one, k in picked))
        assert errors[1] <= errors[0] + 1e-9
        assert errors[0] - errors[1] <= 0.01 * sum(one.errors[0] for one in given)


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("curve", tails.TAILS)
def test_solvers_of_layers_equal_brute_force(curve, measure):
    """The least sum, the least maximum, and the best for a price; costs and errors of
    rank vectors counted one by one, a stack with ranks of its own for each matrix."""
    dense = sum(getattr(cost, f"dense_{measure}") for cost in COSTS.values())
    vectors = [
        {"a": a, "b": [b, c], "c": d}
        for a, b, c, d in itertools.product(*[range(1, n + 1) for n in (6, 5, 4, 3)])
    ]
    costs = np.array(
        [sum(getattr(COSTS[p], measure)(r) for p, r in x.items()) for x in vectors]
    )
    rows = {
        "a": [IMPORTANCES["a"]],
        "b": [IMPORTANCES["b"][0], IMPORTANCES["b"][1, :4]],
        "c": [IMPORTANCES["c"][:3]],
    }
    parts = np.array(
        [
            [
                tails.TAILS[curve](row)[rank]
                for path, several in x.items()
                for row, rank in zip(rows[path], np.ravel(several), strict=True)
            ]
            for x in vectors
        ]
    )
    for share in SHARES:
        fits = costs <= share * dense

        def cost_and_errors(found, fits=fits):
            number = vectors.index(found)
            assert fits[number]
            return costs[number], parts[number]

        given = (COSTS, LIMITS, list_errors(IMPORTANCES, LIMITS, curve), share)
        keys = {"measure": measure}
        _, errors = cost_and_errors(solvers.by_knapsack(*given, **keys))
        assert errors.sum() == pytest.approx(parts[fits].sum(axis=1).min())
        _, errors = cost_and_errors(solvers.by_level(*given, **keys))
        assert errors.max() == pytest.approx(parts[fits].max(axis=1).min())
        cost, errors = cost_and_errors(solvers.by_price(*given, **keys))
        # no vector of this cost or less loses less: it is on the hull
        assert errors.sum() == pytest.approx(parts[costs <= cost].sum(axis=1).min())


@pytest.mark.parametrize("solver", ["by_level", "by_price", "by_knapsack"])
def test_multiples_are_kept(solver):
    """Every rank is one, or the layer's own, or of a layer that has none."""
    solve = getattr(solvers, solver)
    costs = {path: LayerCost(24, 24, 1, 1, 1, 1) for path in "abc"}
    limits = {"a": 21, "b": 24, "c": 3}
    spectra = {path: np.linspace(2, 1, rank) for path, rank in limits.items()}
    errors = list_errors(spectra, limits)
    found = [
        solve(costs, limits, errors, share, measure="params", multiple_of=4)
        for share in (0.4, 0.6, 0.8, 1.0)
    ]
    for ranks in found:
        assert ranks["a"] in (4, 8, 12, 16, 20, 21) and ranks["b"] % 4 == 0
    assert found[-1] == limits and found[0] != limits
    with pytest.raises(UserError, match="^multiple_of: must leave ranks that fit .*16"):
        solve(costs, limits, errors, 0.4, measure="params", multiple_of=16)
    with pytest.raises(UserError, match="^multiple_of: must be at least 1, got 0"):
        solve(costs, limits, errors, 0.4, measure="params", multiple_of=0)


GOLDEN = [
    Options(np.arange(2), np.array([0.0, 3.0]), np.array([1.0, 0.0])),
    Options(
        np.arange(5),
        np.array([0.0, 1.0, 2.0, 3.0, 7.0]),
        np.array([1.4, 1.3, 1.2, 1.1, 0.0]),
    ),
]
"""methods.md section 9: layer A {saves 3: error 1.0}, B {4: 1.1, 5: 1.2, 6: 1.3, 7:
1.4}; together they cost 10."""


def test_the_best_chain_has_the_golden_value():
    """Mean error 1.55 over what 1 to 10 has to be saved; keeping those of the best
    profiles that happen to nest has 1.87."""
    savings = list(range(1, 11))
    chain = knapsack.best_chain(GOLDEN, [10 - saved for saved in savings])

    def saved(profile):
        return tuple(
            int(one.costs[-1] - one.costs[k])
            for one, k in zip(GOLDEN, profile, strict=True)
        )

    assert [saved(profile) for profile in chain] == [
        *[(0, 4)] * 4,
        *[(0, 5), (0, 6), (0, 7)],
        *[(3, 7)] * 3,
    ]
    errors = [
        sum(one.errors[k] for one, k in zip(GOLDEN, profile, strict=True))
        for profile in chain
    ]
    assert np.mean(errors) == pytest.approx(1.55)
    best = [knapsack.solve(GOLDEN, 10 - saved) for saved in savings]
    nested, kept = [1, 4], []  # from the full ranks down
    for profile in best:
        if all(np.less_equal(profile, nested)):
            nested = profile
        kept.append(nested)
    # the control: what happens to nest does not reach every saving in time
    assert any(
        sum(saved(profile)) < wanted
        for profile, wanted in zip(kept, savings, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_equals_enumeration(seed):
    """Four layers, ten budgets: the least sum of errors of all nested chains, by a walk
    over every profile in pure Python."""
    given = table(seed, (3, 4, 3, 3))
    choices = every_choice(given)
    lowest, full = (f(cost for _, cost, _ in choices) for f in (min, max))
    budgets = np.linspace(lowest, full, 10)
    chain = knapsack.best_chain(given, budgets)
    by_options = {chosen: (cost, error) for chosen, cost, error in choices}
    total = 0.0
    for small, large in itertools.pairwise(chain):
        assert all(np.less_equal(small, large))
    for profile, budget in zip(chain, budgets, strict=True):
        cost, error = by_options[tuple(profile)]
        assert cost <= budget
        total += error
    best = {chosen: 0.0 for chosen in by_options}
    for budget in budgets:  # from small to large: the best chain that ends in a profile
        best = {
            chosen: error
            + min(
                value
                for below, value in best.items()
                if all(k <= n for k, n in zip(below, chosen, strict=True))
            )
            for chosen, (cost, error) in by_options.items()
            if cost <= budget
        } | {
            chosen: np.inf for chosen, (cost, _) in by_options.items() if cost > budget
        }
    assert total == pytest.approx(min(best.values()))
    shuffled = [7, 2, 9, 0]
    some = knapsack.best_chain(given, budgets[shuffled])
    ordered = knapsack.best_chain(given, budgets[sorted(shuffled)])
    assert [some[shuffled.index(n)] for n in sorted(shuffled)] == ordered


def test_a_chain_of_many_layers_is_nested_and_near_the_best():
    """Too many profiles to look at all: within five per cent of the sum of the best
    ones, which no nested chain can beat; a chain of the hull alone is not better."""
    given = table(1, (12,) * 8)
    lowest, full = (sum(one.costs[at] for one in given) for at in (0, -1))
    budgets = np.linspace(1.1 * lowest, 0.95 * full, 6)

    def error(profile):
        return sum(one.errors[k] for one, k in zip(given, profile, strict=True))

    chain = knapsack.best_chain(given, budgets)
    for small, large in itertools.pairwise(chain):
        assert all(np.less_equal(small, large))
    best = [error(knapsack.solve(given, budget)) for budget in budgets]
    path = hull.nested_path(given)
    on_hull = [path.errors[np.argmax(path.costs <= budget)] for budget in budgets]
    assert sum(best) <= sum(map(error, chain)) <= min(1.05 * sum(best), sum(on_hull))


def test_the_hull_is_nested_and_convex():
    """From the active ranks down, prices rise; a thinned path has the same ends."""
    given = table(3, (9, 4, 1, 7))
    path = hull.nested_path(given)
    assert path.options[0].tolist() == [8, 3, 0, 6]
    assert path.options[-1].tolist() == [0, 0, 0, 0]
    assert (np.diff(path.options, axis=0) <= 0).all()
    prices = np.diff(path.errors) / -np.diff(path.costs)
    assert (np.diff(prices) >= -1e-9).all()
    for one, cost, error in zip(path.options, path.costs, path.errors, strict=True):
        picked = list(zip(given, one, strict=True))
        assert cost == pytest.approx(sum(x.costs[k] for x, k in picked))
        assert error == pytest.approx(sum(x.errors[k] for x, k in picked))
    few = hull.nested_path(given, 4)
    assert len(few.costs) == len(few.options) == 4
    for name in ("options", "costs", "errors"):
        ends = getattr(few, name)[[0, -1]].tolist()
        assert ends == getattr(path, name)[[0, -1]].tolist()


def test_families_of_layers_are_nested_and_within_their_budgets():
    """As `families` take them, from small to large or in any order."""
    shares = [0.8, 0.4, 0.6]
    errors = list_errors(IMPORTANCES, LIMITS)
    found = solvers.by_chain(COSTS, LIMITS, errors, shares, measure="macs")
    dense = sum(cost.dense_macs for cost in COSTS.values())
    for ranks, share in zip(found, shares, strict=True):
        assert sum(COSTS[p].macs(r) for p, r in ranks.items()) <= share * dense
    large, small, middle = found
    for low, high in ((small, middle), (middle, large), (large, LIMITS)):
        assert all(np.all(np.less_equal(low[path], high[path])) for path in LIMITS)
    assert small != middle != large


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match="^curve: must be one of .*energy.*, got 'x'"):
        list_errors(IMPORTANCES, LIMITS, "x")
    broken = {**IMPORTANCES, "c": np.array([1.0, np.nan, 0, 0])}
    with pytest.raises(UserError, match="^c: importances must be finite"):
        list_errors(broken, LIMITS)


def test_ranks_come_back_in_the_shape_of_their_stacks():
    assert options.as_ranks({"a": 3, "b": [[1, 2]], "c": []}, [1, 2, 3]) == {
        "a": 1,
        "b": [[2, 3]],
        "c": [],
    }


def test_tables_whose_full_rank_costs_nothing_stay_within_the_budget():
    """Their cheapest option is no common level; fractions of MACs stay below it too."""
    costs = {
        "a": LayerCost(100, 100, 1, 1, 1, 1),
        "table": LayerCost(100, 50, 1, 0, 0, 1),
    }
    limits = {"a": 100, "table": 50}
    spectra = {path: np.linspace(2, 1, rank) for path, rank in limits.items()}
    errors = list_errors(spectra, limits)
    for solve in (solvers.by_level, solvers.by_price, solvers.by_knapsack):
        found = solve(costs, limits, errors, 0.09, measure="macs", multiple_of=4)
        assert sum(costs[p].macs(r) for p, r in found.items()) <= 900
    costs = {
        "a": LayerCost(6, 13, 1, 3, 3, 3),
        "table": LayerCost(23, 22, 3, 0, 0, 7),
    }
    limits = {"a": 6, "table": [22, 22, 22]}
    spectra = {"a": np.linspace(2, 1, 6), "table": np.ones((3, 22))}
    errors = list_errors(spectra, limits)
    for fraction in np.linspace(0.05, 1, 96):
        found = solvers.by_energy_at_fraction(costs, limits, errors, float(fraction))
        most = budgets.total_cost(costs, at_fraction(limits, float(fraction)), "macs")
        assert budgets.total_cost(costs, found, "macs") <= most


def test_chains_of_no_layers_are_of_nothing():
    assert solvers.by_chain({}, {}, {}, [0.5, 0.25], measure="params") == [{}, {}]
