"""Surgery on what is shared, stacked, or chosen by rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error
from surgery_models import (
    ROWS,
    Scanned,
    assert_same,
    dense_of,
    dense_outputs,
    draw,
    factored_of,
    linear,
    lower,
    outputs_of,
    values,
)

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Rank
from lowrank_jax.layers import LowRankLinear
from lowrank_jax.paths import find_aliases
from lowrank_jax.surgery import canonicalize, merge, truncate


def test_shared_layers_are_one():
    """One `Factors` for all paths, which all name it in ranks and in rules."""
    model = factored_of("tied modules")
    assert model.first is model.second is model.more[0]
    assert find_aliases(model) == {"more/0": "first", "second": "first"}
    small = truncate(model, {"second": 2})
    assert small.more[0].factors.max_rank == 2 == get_ranks(small)["first"]
    set_ranks(model, {"more/0": 1})
    assert get_ranks(model)["first"] == 1
    back = merge(model)
    assert back.first is back.second is back.more[0] and type(back.first) is nnx.Linear
    by_alias = factorize(
        dense_of("tied modules"), [("second", {"max_rank": 2}), (".*", "dense")]
    )
    assert max_ranks(by_alias) == {"first": 2}
    assert type(by_alias.more[1]) is nnx.Linear


def test_shared_kernels_are_one():
    """Two layers, one `Factors` and two biases, there and back again."""
    model = factored_of("tied parameters")
    assert model.first.factors is model.second.factors
    assert model.first.bias is not model.second.bias
    assert find_aliases(model) == {"second": "first"}
    back = merge(truncate(model, {"second": 2}))
    assert back.first.kernel is back.second.kernel
    assert back.first.bias is not back.second.bias


def test_a_shared_kernel_takes_one_rule():
    """Different ranks for the two layers, or one left dense, would untie it
    silently."""
    rules = [("first", {"max_rank": 2}), ("second", {"max_rank": 3})]
    with pytest.raises(ValueError, match=r"(?s)first.*second|second.*first"):
        factorize(dense_of("tied parameters"), rules)
    with pytest.raises(ValueError, match=r"(?s)first.*second|second.*first"):
        factorize(dense_of("tied parameters"), [("first", "dense"), (".*", "full")])


def test_scanned_layers_have_ranks_of_their_own():
    """Each block at its own rank equals the blocks unrolled and cut one by one."""
    model = factored_of("scanned")
    ranks = lower(ROWS["scanned"].ranks)
    assert len({tuple(rank) for rank in ranks.values()}) > 1
    set_ranks(model, ranks)
    graph, state = nnx.split(model.blocks)
    tokens = ROWS["scanned"].inputs()
    for layer in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda x, n=layer: x[n], state))
        own = {path: rank[layer] for path, rank in ranks.items()}
        tokens = truncate(
            block, {p.removeprefix("blocks/"): r for p, r in own.items()}
        )(tokens)
    assert relative_error(outputs_of(model, "scanned"), tokens) <= 1e-6


def test_scanned_layers_take_ranks_per_example():
    """One rank for each layer and example equals the examples run one by one."""
    model = factored_of("scanned")
    inputs, examples = ROWS["scanned"].inputs(), 2
    table = np.random.default_rng(0).integers(0, 5, (3, examples))
    set_ranks(
        model, dict.fromkeys(ROWS["scanned"].ranks, jnp.asarray(table, jnp.int32))
    )
    found = outputs_of(model, "scanned")
    for example in range(examples):
        set_ranks(
            model, dict.fromkeys(ROWS["scanned"].ranks, table[:, example].tolist())
        )
        expected = model(inputs[example : example + 1])[0]
        assert relative_error(found[example], expected) <= 1e-5


def test_scanned_ranks_must_be_mapped_over_the_layers():
    """A scan that broadcasts all but parameters says so, and what to write instead."""
    axes = {nnx.Param: 0, ...: None}
    model = factorize(Scanned(nnx.Rngs(0), nnx.StateAxes(axes)))
    tokens = ROWS["scanned"].inputs()
    with pytest.raises(ValueError, match="StateAxes"):
        model(tokens)
    axes = {(nnx.Param, Rank): 0, ...: None}
    good = factorize(Scanned(nnx.Rngs(0), nnx.StateAxes(axes)))
    assert relative_error(good(tokens), dense_outputs("scanned")) <= 1e-5


def test_rules_choose_rank_scheme_and_what_stays_dense():
    """The first rule that matches decides; `max_rank` is clipped to the layer's."""
    rules = [
        ("strided", {"rank_fraction": 0.3, "scheme": 2}),
        ("dilated", {"max_rank": 99}),
        (".*", "dense"),
    ]
    model = factorize(dense_of("convolutions"), rules)
    assert max_ranks(model) == {"dilated": 4, "strided": 2}  # ceil(0.3 * 6)
    assert model.strided.fold.first_axes == (0,)
    assert type(model.grouped) is nnx.Conv


def test_rank_zero_may_be_allocated():
    """A layer that is born without columns is its bias."""
    model = factorize(nnx.Linear(4, 3, bias_init=draw, rngs=nnx.Rngs(0)), ALL_ZERO)
    np.testing.assert_array_equal(model(jnp.ones((1, 4)))[0], model.bias[...])
    assert max_ranks(model) == {"": 0} and get_ranks(canonicalize(model)) == {"": 0}


ALL_ZERO = [(".*", {"max_rank": 0})]


def test_the_model_itself_may_be_a_layer():
    """Its path is then the empty string, which rules and ranks can name."""
    model = factorize(linear(4, 3, rngs=nnx.Rngs(0)), [("", "full")])
    assert type(model) is LowRankLinear
    assert get_ranks(truncate(model, {"": 2})) == {"": 2}
    assert type(merge(model)) is nnx.Linear


def test_low_rank_layers_stay_as_they_are():
    """Factorizing twice is factorizing once; hand-made low-rank layers are found."""
    model = factored_of("list")
    again = factorize(model, [(".*", {"max_rank": 1})])
    assert_same(values(again), values(model))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    mixed = nnx.Sequential(
        LowRankLinear(4, 3, max_rank=2, rngs=nnx.Rngs(0)),
        linear(3, 2, rngs=nnx.Rngs(1)),
    )
    assert max_ranks(factorize(mixed)) == {"layers/0": 2, "layers/1": 2}
