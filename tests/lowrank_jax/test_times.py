"""Times by rank, on numbers written down: what they predict, and what is chosen."""

import itertools
import math

import jax
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax.errors import SmallBudget, UserError
from lowrank_jax.selection import choosing
from lowrank_jax.selection.selectors import SELECTORS
from lowrank_jax.times import MERGED, LayerTimes, ModelTimes

LAYER = LayerTimes(
    100.0, {"factored": {1: 20.0, 4: 80.0, 6: 70.0, 8: 120.0}, MERGED: {0: 100.0}}
)


def test_between_measured_ranks_time_is_on_a_line():
    """And a rank that was measured to be faster than a lower one is not."""
    assert [LAYER.at("factored", rank) for rank in (1, 2, 4, 5, 6, 7, 8)] == [
        *(20, 40, 80, 80, 80, 100, 120)
    ]
    assert LAYER.at("factored", 0) == 20  # none was measured below 1


def test_the_fastest_form_counts():
    """Merged above rank 7, where factors take longer than the dense kernel."""
    assert [LAYER.latency(rank) for rank in (2, 6, 8)] == [40, 80, 100]
    assert [LAYER.fastest(rank) for rank in (2, 6, 8)] == ["factored"] * 2 + [MERGED]
    assert LAYER.latency([2, 8]) == 70  # of two matrices


def test_rank_quantisation():
    """The largest rank that takes no longer; dense where a layer does not pay."""
    assert [LAYER.largest_as_fast(rank, 8) for rank in (1, 2, 4, 5, 7, 8)] == [
        *(1, 2, 6, 6, 8, 8)
    ]
    assert LAYER.largest_as_fast(4, 8, multiple_of=5) == 5
    model = ModelTimes(150.0, {"a": LAYER, "b": LAYER})
    assert model.raised({"a": 7, "b": [4, 1]}, {"a": 8, "b": [8, 8]}) == {
        "a": 8,
        "b": [6, 1],
    }


def test_a_model_takes_what_its_layers_save_less():
    """150 ns less 60 that one layer saves and 20 of the other."""
    model = ModelTimes(250.0, {"a": LAYER, "b": LAYER})
    assert model.predict({"a": 2, "b": 6}) == 250 - 60 - 20
    # Half of the whole is 125, of which 50 are not the layers': 75 of their 200.
    assert model.share_of_layers(0.5, {"a": 8, "b": 8}) == 75 / 200
    assert model.share_of_layers(1.0, {"a": 8, "b": 8}) == 1


def test_layers_with_the_same_factors_add_up():
    """Of the second the time between its own ranks counts."""
    other = LayerTimes(10.0, {"factored": {1: 1.0, 8: 8.0}, MERGED: {0: 10.0}})
    both = LAYER + other
    assert both.dense_latency == 110
    assert both.at("factored", 4) == 80 + 4 and both.at(MERGED, 3) == 110


def test_layers_take_no_more_than_their_model():
    """What a call costs is taken off; of what is still too much, the same share."""
    less = LAYER.less(50.0)
    assert less.dense_latency == 50 and less.at("factored", 1) == 0.2
    assert [less.at("factored", rank) for rank in (4, 8)] == [30, 70]
    model = ModelTimes.of(40.0, {"a": less, "b": less})
    assert model.layers["a"].dense_latency == 20
    assert model.predict({"a": 4, "b": 8}) == 12 + 20
    assert ModelTimes.of(400.0, {"a": LAYER}) == ModelTimes(400.0, {"a": LAYER})


@pytest.mark.parametrize("fraction", [0, -1, 1.5, math.nan])
def test_shares_that_are_none(fraction):
    with pytest.raises(UserError, match=r"latency_fraction: must be in \(0, 1\], got"):
        ModelTimes(250.0, {"a": LAYER}).share_of_layers(fraction, {"a": 8})


def test_a_budget_below_the_least():
    """170 ns are left at rank 1: 0.68 of the dense model's 250."""
    model = ModelTimes(250.0, {"a": LAYER})
    with pytest.raises(SmallBudget, match="must be at least 0.68 here"):
        model.share_of_layers(0.67, {"a": 8})
    assert model.share_of_layers(0.68, {"a": 8}) == pytest.approx(0.2)


@pytest.fixture(scope="module")
def context() -> choosing.Context:
    """Two layers whose times are their MACs in the factored and the merged form; what
    is around them takes no time."""
    keys = nnx.Rngs(0)
    model = lr.factorize(
        nnx.Sequential(nnx.Linear(24, 16, rngs=keys), nnx.Linear(16, 12, rngs=keys))
    )
    cost = lr.count(model, jax.ShapeDtypeStruct((1, 24), "float32"))
    layers = {
        path: LayerTimes(
            float(layer.dense_macs),
            {
                "factored": {r: float(layer.factored_macs(r)) for r in range(1, 17)},
                MERGED: {0: float(layer.dense_macs)},
            },
        )
        for path, layer in cost.layers.items()
    }
    times = ModelTimes(float(cost.dense_macs), layers)
    found = choosing.context_of(model, cost)

    def score(several):
        return [float(sum(ranks.values())) for ranks in several]

    return found._replace(times=lambda: times, score=score)


@pytest.mark.parametrize("name", ["energy_budget", "minimax", "welore", "lc"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8, 1.0])
def test_times_that_are_macs_choose_as_macs_do(name, fraction, context):
    """But for ranks that cost as much as all of them, which time raises to all."""
    function = SELECTORS[name].function
    by_macs = choosing.choose(
        function, context, {"measure": "macs", "fraction": fraction}
    )
    by_time = choosing.choose(
        function, context, {"measure": "latency", "fraction": fraction}
    )
    times, layers = context.times().layers, context.cost.layers
    for path, rank in by_macs.items():
        dense = layers[path].macs(rank) == layers[path].dense_macs
        assert by_time[path] == (context.ranks[path] if dense else rank)
        assert times[path].latency(by_time[path]) == layers[path].macs(rank)


@pytest.mark.parametrize("name", ["knapsack", "family", "swaps", "greedy"])
def test_no_choice_takes_longer_than_its_budget(name, context):
    """Of the whole model, and a smaller budget takes no longer."""
    args = {"steps": 5} if name == "greedy" else {}
    before = 0.0
    for fraction in (0.2, 0.35, 0.5, 0.8, 1.0):
        budget = {"measure": "latency", "fraction": fraction, **args}
        ranks = choosing.choose(SELECTORS[name].function, context, budget)
        taken = context.times().predict(ranks) / context.times().dense
        assert before - 1e-9 <= taken <= fraction + 1e-9
        before = taken
    assert ranks == context.ranks


def test_sizes_by_time_are_nested(context):
    """By the best chain, each within its share."""
    function = SELECTORS["knapsack"].function
    sizes = (0.6, 0.3, 0.15)
    found = choosing.choose_family(function, context, {"measure": "latency"}, sizes)
    for size, ranks in zip(sizes, found, strict=True):
        assert context.times().predict(ranks) <= size * context.times().dense
    for large, small in itertools.pairwise(found):
        assert all(large[path] >= small[path] for path in context.ranks)


def test_time_without_a_clock_is_refused(context):
    choice = {"measure": "latency", "fraction": 0.5}
    with pytest.raises(UserError, match="'latency' must have measured times, got none"):
        choosing.choose(
            SELECTORS["knapsack"].function, context._replace(times=None), choice
        )
