"""What surgery refuses, by name and all at once; and what it must not do."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from reference import relative_error
from surgery_models import ROWS, dense_of, draw, factored_of

from lowrank_jax.active import check_ranks, get_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.layers import LAYERS, LowRankLayer
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import canonicalize, truncate


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_masked_convolutions_and_odd_einsums_are_refused_together():
    """Layers without a low-rank form are named, all at once."""

    class Odd(nnx.Module):
        def __init__(self, rngs):
            mask = jnp.ones((2, 2, 2, 2))
            self.masked = nnx.Conv(2, 2, (2, 2), mask=mask, rngs=rngs)
            self.scaled = nnx.Einsum("bi,i->bi", (3,), kernel_init=draw, rngs=rngs)

    with pytest.raises(ValueError, match=r"(?s)^masked: .*\nscaled: "):
        factorize(Odd(nnx.Rngs(0)))


WRONG_RULES = {
    "unused": [(".*", "full"), ("encoder/.*", "dense"), ("heads", "dense")],
    "uncovered": [("head", "full")],
    "negative": [("hidden/.*", {"max_rank": -1}), ("head", "dense")],
    "bool": [("hidden/.*", {"max_rank": True}), ("head", "dense")],
    "float": [("hidden/.*", {"max_rank": 2.0}), ("head", "dense")],
    "fraction zero": [("hidden/.*", {"rank_fraction": 0.0}), ("head", "dense")],
    "fraction bool": [("hidden/.*", {"rank_fraction": True}), ("head", "dense")],
    "fraction text": [("hidden/.*", {"rank_fraction": "0.5"}), ("head", "dense")],
    "both": [("hidden/.*", {"max_rank": 1, "rank_fraction": 0.5}), ("head", "dense")],
    "scheme": [("hidden/.*", {"scheme": 0}), ("head", "dense")],
    "unknown word": [("hidden/.*", "half"), ("head", "dense")],
    "unknown key": [("hidden/.*", {"rank": 2}), ("head", "dense")],
    "number": [("hidden/.*", 3), ("head", "dense")],
    "pattern": [("hidden/(", "full"), ("head", "dense")],
}
NAMED = {
    "unused": ["encoder/.*", "heads", "hidden/0"],
    "fraction zero": ["hidden/0", "hidden/1", "(0, 1]", "0.0"],
    "fraction bool": ["hidden/0", "hidden/1", "rank_fraction", "True"],
    "fraction text": ["hidden/0", "hidden/1", "rank_fraction", "'0.5'"],
    "scheme": ["hidden/0", "hidden/1", "scheme"],
    "number": ["hidden/0", "hidden/1", "'dense'", "got 3"],
    "pattern": ["hidden/("],
}


BEGINS = {
    "unused": "every rule must match a layer, got no match for",
    "uncovered": "every layer must be covered by a rule, got none for",
    "pattern": "a pattern must be a regular expression",
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules_are_refused_with_all_offenders(case):
    """The message begins with the rule or the layer that breaks it, and names every
    layer or pattern, and what is allowed."""
    with pytest.raises(UserError) as error:
        factorize(dense_of("list"), WRONG_RULES[case])
    message = str(error.value)
    assert message.startswith(BEGINS.get(case, "hidden/0: "))
    for part in NAMED.get(case, ["hidden/0", "hidden/1"]):
        assert part in message, message


WRONG_RANKS = {
    "above": ({"hidden/0": 5, "head": 4}, ["hidden/0", "[0, 4]", "head", "[0, 3]"]),
    "negative": ({"hidden/0": -1, "head": -2}, ["hidden/0", "-1", "head", "-2"]),
    "bool": ({"hidden/0": True, "head": False}, ["hidden/0", "True", "head", "False"]),
    "float": ({"hidden/0": 2.0, "head": 1.5}, ["hidden/0", "2.0", "head", "1.5"]),
    "text": ({"head": "2"}, ["head", "'2'"]),
    "none": ({"head": None}, ["head", "None"]),
    "unknown": (
        {"body": 1, "tail": 1, "head": 9},
        ["body", "tail", "head", "hidden/0"],
    ),
    "list": ({"head": [1]}, ["head", "[1]"]),
}
WRONG_STACK_RANKS = {
    "above": ({"grouped": [1, 4], "strided": 7}, ["grouped", "[0, 3]", "strided"]),
    "short": ({"grouped": [1]}, ["grouped", "(2,)"]),
    "ragged": ({"grouped": [[1], [1, 2]]}, ["grouped", "(2,)"]),
    "bool": ({"grouped": [True, False]}, ["grouped", "True"]),
}


@pytest.mark.parametrize("operation", [truncate, set_ranks, check_ranks])
@pytest.mark.parametrize(
    ("name", "ranks", "parts"),
    [("list", *case) for case in WRONG_RANKS.values()]
    + [("convolutions", *case) for case in WRONG_STACK_RANKS.values()],
)
def test_wrong_ranks_are_refused_with_all_offenders(operation, name, ranks, parts):
    """(4) The message names every layer, its limit and what was given; nothing
    changes."""
    model = factored_of(name)
    with pytest.raises(ValueError) as error:
        operation(model, ranks)
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert get_ranks(model) == ROWS[name].ranks


def test_ranks_cannot_come_back_after_a_cut():
    """(4) The limit is what is allocated now, not what once was."""
    small = truncate(factored_of("list"), {"head": 1})
    with pytest.raises(ValueError, match=r"head: rank must be in \[0, 1\], got 2"):
        truncate(small, {"head": 2})


def test_set_ranks_recompiles_nothing():
    """(3) Ranks are arrays: one program runs them all, plain, traced or per stack."""
    model = factored_of("convolutions")
    traces = []

    @jax.jit
    def run(state):
        traces.append(None)
        return nnx.merge(graph, state)(ROWS["convolutions"].inputs())

    graph, state = nnx.split(model)
    results = [run(state)]
    for ranks in ({"grouped": 1}, {"grouped": [0, 2]}, {"strided": jnp.int32(2)}):
        set_ranks(model, ranks)
        assert nnx.graphdef(model) == graph
        results.append(run(nnx.state(model)))
    assert len(traces) == 1
    assert all(relative_error(x, results[0]) > 1e-3 for x in results[1:])


def test_low_rank_layers_are_low_rank_modules():
    """Every dense type in the table has a twin that names it."""
    assert all(issubclass(twin, LowRankLayer) for twin in LAYERS.values())
    assert all(twin.dense_type is dense for dense, twin in LAYERS.items())


def test_factors_that_are_not_finite_have_no_canonical_form():
    model = factorize(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    u = find_factors(model)["layers/0"].u
    u[...] = u[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="layers/0: factors must be finite"):
        canonicalize(model)
