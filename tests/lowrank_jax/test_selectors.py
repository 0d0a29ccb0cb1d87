"""The contract of every selector, and `ranks_for`."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import check_form
from selector_rows import ROWS

from lowrank_jax import families
from lowrank_jax.active import get_ranks, rank_limits, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Rank
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Ranks, check_lower, flatten_rank, lowest
from lowrank_jax.selection import curves
from lowrank_jax.selection.budgets import total_cost
from lowrank_jax.selection.choosing import (
    choose,
    choose_family,
    context_of,
    ranks_for,
)
from lowrank_jax.selection.context import Context
from lowrank_jax.selection.selectors import SELECTORS
from lowrank_jax.surgery import truncate


class Net(nnx.Module):
    """A layer, a stack of three run one after the other, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, use_bias=False, rngs=rngs)

        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.blocks = stack(rngs.split(3))
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        axes = nnx.StateAxes({(nnx.Param, Rank): 0, ...: None})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(block: nnx.Linear, hidden: jax.Array) -> jax.Array:
            return block(hidden)

        return self.head(run(self.blocks, self.first(inputs)))


ACTIVE: dict[str, Ranks] = {
    "full": {},
    "masked": {"first": 2, "head": 3},
    "ragged stack": {"blocks": [1, 2, 5]},
    "masked to nothing": {"first": 0, "blocks": [0, 3, 6]},
}
"""What is masked in the models of the table; the rest is at its allocated rank."""


def score(candidates: Sequence[Ranks]) -> list[float]:
    """Rises with every rank, with an interaction."""
    return [
        sum(flatten_rank(r["blocks"])) + 3 * r["first"] ** 0.5 * r["head"] ** 0.5
        for r in candidates
    ]


@functools.cache
def model_of(name: str) -> nnx.Module:
    model = factorize(Net(nnx.Rngs(0)))
    set_ranks(model, ACTIVE[name])
    return model


@functools.cache
def context(name: str) -> Context:
    model = model_of(name)
    cost = count(model, jax.ShapeDtypeStruct((1, 5), jnp.float32))
    return context_of(model, cost, score=score)


def run(selector: str, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    return choose(SELECTORS[selector].function, context(name), args)


def test_every_selector_has_a_row():
    """A new selector is put into the table above."""
    assert SELECTORS.keys() == ROWS.keys()
    assert all(row.bad for row in ROWS.values())
    assert all(len(row.args) > 2 for row in ROWS.values() if row.args != ({},))


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("selector", ROWS)
def test_ranks_are_legal_and_never_raised(selector, name):
    """One for each layer in the shape of its stack, plain numbers, at most the active
    one; the model takes them, and a second time nothing changes."""
    active, limits = get_ranks(model_of(name)), rank_limits(model_of(name))
    for args in ROWS[selector].args:
        found = run(selector, name, args)
        assert found.keys() == active.keys()
        check_lower(found, limits)
        for path, rank in found.items():
            assert np.shape(rank) == np.shape(active[path])
            assert all(type(number) is int for number in flatten_rank(rank))
            assert np.all(np.less_equal(rank, active[path]))
        assert run(selector, name, args) == found
    assert get_ranks(truncate(model_of(name), found)) == found
    if args:  # the most of each row is everything
        assert found == active


def removed_energy(name: str, ranks: Ranks) -> float:
    """The sum over all matrices of the share of their energy that goes."""
    total = 0.0
    for path, columns in context(name).importances().items():
        rows = np.reshape(columns, (-1, columns.shape[-1])) ** 2
        for row, rank in zip(rows, flatten_rank(ranks[path]), strict=True):
            total += row[rank:].sum() / max(row.sum(), 1e-30)
    return total


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("selector", ROWS)
def test_more_is_never_less(selector, name):
    """No rank falls as the value rises; of a search over all ranks, what it is for:
    the score rises, the error falls."""
    found = [run(selector, name, args) for args in ROWS[selector].args]
    assert name != "full" or len(found) == 1 or found[0] != found[-1]
    for small, large in itertools.pairwise(found):
        if selector in ("beam", "greedy", "swaps"):
            assert score([small])[0] <= score([large])[0]
        elif selector == "knapsack":
            assert removed_energy(name, small) >= removed_energy(name, large)
        else:
            assert all(np.all(np.less_equal(small[p], large[p])) for p in small)


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize(
    "selector",
    ["params_fraction", "macs_fraction"]
    + [name for name, row in ROWS.items() if "fraction" in row.args[0]],
)
def test_budgets_are_kept(selector, name):
    """Counted by the model's cost, less what is not factored."""
    cost = context(name).cost
    for args in ROWS[selector].args:
        found = run(selector, name, args)
        measure = args.get("measure", selector.removesuffix("_fraction"))
        share = args.get("fraction", args.get("value"))
        fixed, dense = (getattr(cost, f"{x}_{measure}") for x in ("fixed", "dense"))
        assert getattr(cost, measure)(found) - fixed <= share * (dense - fixed)


@pytest.mark.parametrize("name", ["full", "masked"])
def test_energy_at_a_fraction_costs_no_more_than_the_fraction(name):
    """In MACs, and there is no more energy to have at this price."""
    layers, energies = context(name).cost.layers, context(name).importances()

    def least_energy(ranks: Ranks) -> float:
        """The share of the layer that keeps the least."""
        return min(
            float(np.min(np.cumsum(row**2)[max(rank, 1) - 1] / np.sum(row**2)))
            for path, columns in energies.items()
            for row, rank in zip(
                np.reshape(columns, (-1, columns.shape[-1])),
                flatten_rank(ranks[path]),
                strict=True,
            )
        )

    for args in ROWS["energy_fraction"].args:
        found, uniform = (
            run(x, name, args) for x in ("energy_fraction", "rank_fraction")
        )
        costs = [total_cost(layers, x, "macs") for x in (found, uniform)]
        assert costs[0] <= costs[1]
        assert least_energy(found) >= least_energy(uniform) - 1e-6


def test_families_are_nested_and_chosen_for_budgets():
    """By a chain where there is one; what is not nested is refused, and so is a budget
    that comes twice, or none."""
    whole, fractions = context("full"), (0.4, 0.8, 0.6)
    for name in ("knapsack", "lc", "minimax"):
        function = SELECTORS[name].function
        found = choose_family(function, whole, {"measure": "macs"}, fractions)
        small, large, middle = found
        for low, high in ((small, middle), (middle, large)):
            assert all(np.all(np.less_equal(low[path], high[path])) for path in low)
        for ranks, fraction in zip(found, fractions, strict=True):
            cost = total_cost(whole.cost.layers, ranks, "macs")
            dense = whole.cost.dense_macs - whole.cost.fixed_macs
            assert cost <= fraction * dense
    function = SELECTORS["knapsack"].function
    for bad in ((), (0.5, 0.5)):
        with pytest.raises(UserError, match="^family: must have budgets, none twice"):
            choose_family(function, whole, {"measure": "macs"}, bad)
    with pytest.raises(UserError, match="^must be given the arguments"):
        choose_family(function, whole, {"measur": "macs"}, (0.5,))

    def crossing(context: Context, *, fraction: float) -> Ranks:
        return {"head": 1, "first": 4} if fraction < 0.5 else {"head": 4, "first": 1}

    with pytest.raises(UserError, match=r"^family: profiles must be nested.*\['first"):
        choose_family(crossing, whole, {}, (0.3, 0.7))


def test_a_budget_between_two_sizes_lies_on_the_line():
    """The next rank of the line would not fit."""
    whole = context("full")
    half = {
        path: lowest(rank, 2 + 2 * (path == "head"))
        for path, rank in whole.ranks.items()
    }
    trained = whole._replace(family=[(0.5, half)])
    layers = whole.cost.layers
    dense = whole.cost.dense_macs - whole.cost.fixed_macs
    line = [
        families.member(trained.family, whole.ranks, x / 999) for x in range(1, 1000)
    ]
    for share in (0.4, 0.6, 0.8):
        args = {"measure": "macs", "fraction": share}
        found = choose(SELECTORS["family"].function, trained, args)
        fitting = [x for x in line if total_cost(layers, x, "macs") <= share * dense]
        assert found == fitting[-1]
    uniform = SELECTORS["macs_fraction"].function
    assert found != choose(uniform, whole, {"value": 0.8})


def test_a_fraction_is_a_member_of_the_family_where_there_is_one():
    whole = context("full")
    half = {path: lowest(rank, 1) for path, rank in whole.ranks.items()}
    trained = whole._replace(family=[(0.5, half)])
    choose_half = functools.partial(choose, SELECTORS["rank_fraction"].function)
    assert choose_half(trained, {"value": 0.5}) == half
    assert choose_half(trained, {"value": 1.0}) == whole.ranks
    assert choose_half(whole, {"value": 0.5}) != half


@pytest.mark.parametrize("selector", ROWS)
def test_bad_values_are_refused_by_name(selector):
    """Out of bounds, NaN, other types, other names."""
    for args, message in ROWS[selector].bad:
        with pytest.raises(UserError, match=message):
            run(selector, "masked", args)
    with pytest.raises(UserError, match="^must be given the arguments"):
        run(selector, "masked", {"another": 1})


def test_weights_that_are_not_finite_are_refused_by_the_layer():
    """By what reads them."""
    model = factorize(Net(nnx.Rngs(0)))
    factors = find_factors(model)["head"]
    factors.u.set_value(factors.u[...].at[0, 0].set(jnp.nan))
    budget = {"measure": "params", "fraction": 0.5}
    choices = {"energy": 0.9, "entropy": 0.9, "threshold": 0.1, "stable_rank": 1.0}
    choices |= {"evbmf": {}, "effective_rank": 1.0}
    choices |= dict.fromkeys(("energy_budget", "minimax", "welore", "lc"), budget)
    for name, value in choices.items():
        choice = {name: value}
        message = f"^{name}: head: importances must be finite"
        with pytest.raises(UserError, match=message):
            ranks_for(model, **choice)
    assert ranks_for(model, rank=1)["head"] == 1


def test_rows_say_what_a_command_line_needs():
    """Help from the docstring; the type of the single value, None for several."""
    types = {name: row.value_type for name, row in SELECTORS.items()}
    singles = {name: kind for name, kind in types.items() if kind is not None}
    assert [name for name, kind in types.items() if kind is None] == [
        "evbmf",
        *("energy_budget", "minimax", "welore", "lc", "knapsack", "family"),
        *("greedy", "beam", "swaps"),
    ]
    assert singles.pop("rank") is int and singles.pop("ranks") is Mapping
    assert set(singles.values()) == {float}
    for name, row in SELECTORS.items():
        assert row.help.endswith(".") and len(row.help) > 20, name


def test_selectors_of_ones_own_are_checked_as_well():
    """Ranks above the active one, unknown paths, nothing at all; a part is enough."""

    def greedy(context: Context, *, rank: int):
        return {"head": rank}

    masked = context("masked")
    assert choose(greedy, masked, {"rank": np.int64(1)}) == {**masked.ranks, "head": 1}
    with pytest.raises(UserError, match=r"^head: rank must be in \[0, 3\], got 4"):
        choose(greedy, masked, {"rank": 4})
    with pytest.raises(UserError, match=r"^must be given .*\['rank'\], got \{"):
        choose(greedy, masked, {"value": 4})
    with pytest.raises(UserError, match="^a selector must return a mapping"):
        choose(lambda context: [1], masked, {})
    with pytest.raises(UserError, match=r"must name low-rank layers, got \['x'\]"):
        choose(lambda context: {"x": 1}, masked, {})


def test_shared_factors_may_be_named_by_any_path():
    """As `set_ranks` and `truncate` take them."""
    model = nnx.Module()
    model.a = model.b = factorize(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    assert ranks_for(model, ranks={"b": 2}) == {"a": 2}


def test_ranks_for_is_the_selector():
    """The same as through a context; without an example where no MACs are asked for."""
    model, example = model_of("masked"), jax.ShapeDtypeStruct((1, 5), jnp.float32)
    for name, row in SELECTORS.items():
        for args in ROWS[name].args:
            value = args["value"] if row.value_type else args
            found = ranks_for(model, example, score=score, **{name: value})
            assert found == run(name, "masked", args)
            by_macs = ("macs_fraction", "energy_fraction")
            macs = name in by_macs or args.get("measure") == "macs"
            if not macs:
                assert ranks_for(model, score=score, **{name: value}) == found
            else:
                with pytest.raises(UserError, match="needs an example input"):
                    ranks_for(model, score=score, **{name: value})
    assert ranks_for(model, jnp.ones((1, 5)), macs_fraction=0.6) == ranks_for(
        model, example, macs_fraction=0.6
    )


def test_ranks_for_refuses_what_it_cannot_do():
    """No choice, two, unknown ones, no layers, no score, no mapping."""
    model = model_of("full")
    for choice in ({}, {"rank": 2, "energy": 0.5}, {"ranke": 2}):
        with pytest.raises(UserError, match="exactly one of rank, rank_fraction, .*"):
            ranks_for(model, **choice)
    with pytest.raises(UserError, match="model: must have low-rank layers"):
        ranks_for(Net(nnx.Rngs(0)), rank=2)
    with pytest.raises(UserError, match="^beam: score: .* held-out training data"):
        ranks_for(model, beam=ROWS["beam"].args[0])
    with pytest.raises(UserError, match="beam: must be given the arguments"):
        ranks_for(model, beam=0.5, score=score)


def test_numbers_of_numpy_are_numbers():
    """As Python's, whatever their type; other scalars are refused."""
    model = model_of("full")
    for dtype in (np.float16, np.float32, np.float64):
        assert ranks_for(model, rank_fraction=dtype(0.5)) == ranks_for(
            model, rank_fraction=0.5
        )
        for name in ("energy", "params_fraction"):
            assert ranks_for(model, **{name: dtype(0.5)}) == ranks_for(
                model, **{name: 0.5}
            )
    assert ranks_for(model, rank=np.int8(2)) == ranks_for(model, rank=2)
    for bad in (np.complex64(0.5), np.bool_(True), np.array([0.5])):
        with pytest.raises(UserError, match="^rank_fraction: must be a number, got"):
            ranks_for(model, rank_fraction=bad)


def test_every_message_of_ranks_for_names_the_selector_once():
    """And the layer or argument after it, what was given, and what to do."""
    model, example = model_of("masked"), jax.ShapeDtypeStruct((1, 5), jnp.float32)
    for name, row in SELECTORS.items():
        for args, _ in ROWS[name].bad:
            if row.value_type and set(args) != {"value"}:
                continue
            value = args["value"] if row.value_type else args
            with pytest.raises(UserError, match=f"^{name}: ") as error:
                ranks_for(model, example, score=score, **{name: value})
            check_form(str(error.value))


def test_the_mask_is_what_energy_sees():
    """Of {2, 3} of 6 active columns 99 % of the energy is at most {2, 3}: bug 3."""
    model = factorize(
        nnx.Sequential(
            nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 6, rngs=nnx.Rngs(1))
        )
    )
    paths = list(get_ranks(model))
    set_ranks(model, dict(zip(paths, (2, 3), strict=True)))
    found = curves.column_importances(find_factors(model))
    assert [np.count_nonzero(found[path]) for path in paths] == [2, 3]
    assert list(ranks_for(model, energy=0.99).values()) == [2, 3]
    assert list(ranks_for(model, energy=1.0).values()) == [2, 3]
