"""The gauge-aligned form: the product to rounding, its counts, and no other rank."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from reference import relative_error

from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, max_ranks, rank_limits, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize, rules_of
from lowrank_jax.factors import Factors
from lowrank_jax.forms import FORMS, GaugeFactors
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import canonicalize, merge, truncate


class Net(nnx.Module):
    """Every kind of layer, a grouped convolution and a tied one among them."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 6, (2, 2), rngs=rngs)
        self.groups = nnx.Conv(6, 4, (1, 1), feature_group_count=2, rngs=rngs)
        self.table = nnx.Embed(7, 4, rngs=rngs)
        self.general = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("bhwnd,ndo->bhwo", (2, 3, 5), (5,), rngs=rngs)
        self.linear = nnx.Linear(5, 4, rngs=rngs)
        self.again = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.tied = self.again

    def __call__(self, images):
        words = self.table(jnp.arange(7)).sum(0)
        hidden = self.groups(jnp.tanh(self.conv(images))) + words.reshape(1, 1, 1, 4)
        hidden = self.linear(self.einsum(self.general(hidden)))
        return self.table.attend(self.tied(self.again(hidden)))


class Scanned(saved_models.Scanned):
    """The stacked layers, on images."""

    def __call__(self, images):
        return super().__call__(images[..., :2].reshape(-1, 4))


INPUTS = jnp.sin(jnp.arange(64.0)).reshape(2, 4, 4, 2)
RANKS = {
    Net: {
        **{"again": 2, "conv": 4, "einsum": 3, "general": 2},
        **{"groups": [1, 1], "linear": 0, "table": 4},
    },
    Scanned: {"layers": [2, 2, 2]},
}


@functools.cache
def parts(kind: type[nnx.Module], with_s: bool):
    return nnx.split(factorize(kind(nnx.Rngs(0)), [(".*", {"with_s": with_s})]))


def factored(kind: type[nnx.Module] = Net, with_s: bool = False) -> nnx.Module:
    return nnx.merge(*parts(kind, with_s), copy=True)


@functools.cache
def gauge_parts(kind: type[nnx.Module]):
    return nnx.split(truncate(factored(kind), RANKS[kind], form="gauge"))


def gauge(kind: type[nnx.Module] = Net) -> nnx.Module:
    return nnx.merge(*gauge_parts(kind), copy=True)


@pytest.fixture(params=[Net, Scanned])
def kind(request: pytest.FixtureRequest) -> type[nnx.Module]:
    return request.param


def with_condition(
    random: np.random.Generator, rows: int, rank: int, condition: float
) -> np.ndarray:
    """A matrix whose singular values fall from 1 to 1 / condition."""
    left, _ = np.linalg.qr(random.normal(size=(rows, rank)))
    right, _ = np.linalg.qr(random.normal(size=(rank, rank)))
    return left * np.geomspace(1, 1 / condition, rank) @ right


@pytest.mark.parametrize("condition", [(1, 1), (1e4, 1), (1, 1e6), (1e8, 1e8)])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_it_equals_the_product_whatever_the_condition(condition, stack):
    """Against float64, with factors of condition up to 1e8; its entries stay small."""
    random = np.random.default_rng(0)

    def draw(rows, condition):
        arrays = [with_condition(random, rows, 16, condition) for _ in range(4)]
        return np.reshape(arrays[: int(np.prod(stack))], (*stack, rows, 16))

    u, v = np.float32(draw(48, condition[0])), np.float32(draw(40, condition[1]))
    factors = Factors(jnp.asarray(u), jnp.asarray(np.swapaxes(v, -1, -2)))
    form = GaugeFactors.from_factors(factors)
    expected = np.float64(u) @ np.float64(np.swapaxes(v, -1, -2))
    assert relative_error(form.matrix(), expected) <= 1e-6
    product = form.active_u(None) @ form.active_v(None)
    assert relative_error(product, expected) <= 1e-6
    assert np.abs(form.rest[...]).max() < 4
    assert form.u.shape == (*stack, 48, 16) and form.rest.shape == (*stack, 16, 24)


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_a_product_of_lower_rank_than_its_columns_is_no_trouble(rank):
    """Zero columns, which a lasso leaves: zero rows of `rest`, nothing infinite."""
    random = np.random.default_rng(1)
    u = np.float32(random.normal(size=(9, 6)) * (np.arange(6) < rank))
    v = np.float32(random.normal(size=(6, 8)))
    form = GaugeFactors.from_factors(Factors(jnp.asarray(u), jnp.asarray(v)))
    np.testing.assert_allclose(form.matrix(), u @ v, atol=1e-6)
    assert np.isfinite(form.rest[...]).all()
    assert sorted(form.columns[...].tolist()) == list(range(8))


@pytest.mark.parametrize("with_s", [False, True])
def test_truncating_to_the_form_keeps_the_function(kind, with_s):
    """Of the cut model, in every layer, masked ranks included; `merge` too."""
    model = factored(kind, with_s)
    small = truncate(model, RANKS[kind])
    set_ranks(model, RANKS[kind])  # the layers that are not named: at their active rank
    form = truncate(model, {}, form="gauge")
    found = find_factors(form)
    assert all(type(factors) is GaugeFactors for factors in found.values())
    assert get_ranks(form) == max_ranks(form) == RANKS[kind]
    expected = small(INPUTS)
    assert relative_error(form(INPUTS), expected) <= 1e-5
    graph, state = nnx.split(form)
    jitted = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert relative_error(jitted(state, INPUTS), expected) <= 1e-5
    merged = merge(form)
    assert nnx.graphdef(merged) == nnx.graphdef(merge(small))
    assert relative_error(merged(INPUTS), expected) <= 1e-5
    if kind is Net:
        assert form.again.factors is form.tied.factors


def test_square_factors_are_absorbed():
    model = factorize(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), [("", {"depth": 4})])
    form = truncate(model, {"": 3}, form="gauge")
    x = jnp.ones((2, 6))
    assert relative_error(form(x), truncate(model, {"": 3})(x)) <= 1e-5


@pytest.mark.parametrize("rank", [0, 5, 8, 16])
@pytest.mark.parametrize("rows", [1, 32])
def test_counts_are_those_of_xla_and_below_dense(rank, rows):
    """r (i + o - r) parameters and MACs; the identity is not multiplied."""
    dense = nnx.Linear(24, 16, use_bias=False, rngs=nnx.Rngs(0))
    form = truncate(factorize(dense), {"": rank}, form="gauge")
    example = jax.ShapeDtypeStruct((rows, 24), jnp.float32)
    cost = count(form, example)
    numbers = rank * (24 + 16 - rank)
    assert cost.params({"": rank}) == numbers == cost.layers[""].factored_params(rank)
    assert cost.macs({"": rank}) == rows * numbers
    assert sum(x.size for x in jax.tree.leaves(nnx.state(form, nnx.Param))) == numbers
    assert cost.dense_params == 24 * 16 and numbers <= 24 * 16
    assert cost.fixed_params == 0
    graph, state = nnx.split(form)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    if rank in (5, 8):  # XLA makes something else of empty products
        flops = run.lower(state, example).compile().cost_analysis()["flops"]
        sorting = 4 * 16 * 16  # at most: the order of the columns
        assert 2 * rows * numbers <= flops <= 2 * rows * numbers + sorting


def test_other_layers_count_what_they_multiply():
    """An einsum applies the identity with the rest; parameters are spared all the
    same."""
    form = gauge()
    cost = count(form, jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32))
    einsum, linear = cost.layers["einsum"], cost.layers["again"]
    assert einsum.params(3) == 3 * (6 + 5 - 3)
    assert einsum.macs(2) == 16 * 2 * (6 + 5)
    assert linear.macs(2) == 2 * 16 * 2 * (4 + 4 - 2)  # tied: it is called twice
    params = sum(x.size for x in jax.tree.leaves(nnx.state(form, nnx.Param)))
    assert cost.params(get_ranks(form)) == params


def test_a_checkpoint_gives_it_back(kind, tmp_path):
    """Bit for bit, from the rules in the metadata alone; the order of columns too."""
    model = gauge(kind)
    checkpoint.save(tmp_path / "form", model)
    saved = checkpoint.open_checkpoint(tmp_path / "form")
    rules = saved.metadata["rank_rules"]
    assert all(rule["form"] == "gauge" for _, rule in rules if rule != "dense")
    abstract = nnx.eval_shape(lambda: factorize(kind(nnx.Rngs(3)), rules))
    assert rules_of(abstract) == rules_of(model)
    for ranks in (None, {}, RANKS[kind]):
        found = checkpoint.load(saved, abstract, ranks=ranks)
        assert nnx.graphdef(found) == nnx.graphdef(model)
        for leaf, expected in zip(
            *(jax.tree.leaves(nnx.state(x)) for x in (found, model)), strict=True
        ):
            np.testing.assert_array_equal(leaf, expected, strict=True)
        np.testing.assert_array_equal(found(INPUTS), model(INPUTS))
    first, rank = next(iter(RANKS[kind].items()))
    lower = np.subtract(rank, 1).tolist()
    with pytest.raises(UserError, match=f"{first}: rank must be .* only one of its"):
        checkpoint.load(saved, abstract, ranks={first: lower})


def lower_plain(model):
    set_ranks(model, {"again": 1, "conv": 3})


def lower_array(model):
    set_ranks(model, {"again": jnp.int32(1), "conv": np.asarray(3)})


def per_example(model):
    set_ranks(model, {"again": jnp.array([2, 2]), "conv": np.array([4, 3])})


def lower_cut(model):
    truncate(model, {"again": 1, "conv": 3})


def higher(model):
    truncate(model, {"again": 3, "conv": 5})


@pytest.mark.parametrize(
    "lower", [lower_plain, lower_array, per_example, lower_cut, higher]
)
def test_another_rank_is_refused_by_name(lower):
    """Everywhere, all layers at once; nothing changes."""
    model = gauge()
    match = r"(?s)again: rank must be 2, the only one.*conv: rank must be 4, the only"
    with pytest.raises(UserError, match=match):
        lower(model)
    assert get_ranks(model) == RANKS[Net]
    set_ranks(model, RANKS[Net])
    assert not any(limits.nested for limits in rank_limits(model).values())


def test_traced_ranks_are_refused_by_name():
    """As a sampler sets them in a jitted step: they may be lower ones."""
    model = gauge()

    @jax.jit
    def step(rank):
        set_ranks(model, {"conv": rank})

    with pytest.raises(UserError, match="conv: rank must be 4.*a traced one"):
        step(jnp.int32(4))


@pytest.mark.parametrize(
    "operation", [canonicalize, lambda m: truncate(m, {}, form="x")]
)
def test_what_has_no_meaning_is_refused(operation):
    with pytest.raises(UserError, match=r"again: the gauge|\['factored', 'gauge'\]"):
        operation(gauge())


def test_stacks_of_different_ranks_are_refused_by_name():
    """All of them; a rank that is only masked counts as much."""
    ranks = {"groups": [1, 2]}
    with pytest.raises(UserError, match=r"groups: .*one rank for all.*\[1, 2\]"):
        truncate(factored(), ranks, form="gauge")
    model = factored(Scanned)
    set_ranks(model, {"layers": [2, 3, 3]})
    with pytest.raises(UserError, match=r"layers: .*one rank for all"):
        truncate(model, {}, form="gauge")


def test_a_traced_rank_has_no_gauge():
    """A masked model would come out at its allocated rank; a known one is no trouble,
    and a cut of factors raises no rank."""
    model = factorize(nnx.Linear(12, 10, rngs=nnx.Rngs(0)), [("", {"max_rank": 8})])
    set_ranks(model, {"": 2})
    with pytest.raises(UserError, match="the model itself: .* known rank, got a trac"):
        nnx.jit(lambda model: truncate(model, {}, form="gauge"))(model)
    with pytest.raises(UserError, match="known rank, got a traced one"):
        nnx.eval_shape(lambda model: truncate(model, {"": 5}, form="gauge"), model)
    assert get_ranks(nnx.jit(lambda m: truncate(m, {"": 5}))(model)) == {"": 2}
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def align(params):
        model = nnx.merge(graph, params, rest, copy=True)
        return nnx.state(truncate(model, {}, form="gauge"))

    form = truncate(model, {}, form="gauge")
    small = nnx.merge(nnx.graphdef(form), align(params))
    assert get_ranks(small) == {"": 2}
    assert relative_error(small(jnp.ones((3, 12))), model(jnp.ones((3, 12)))) <= 1e-5


def test_a_rule_makes_the_form_abstractly():
    """Its own factors have a known rank under any trace."""
    dense = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    rules = [("", {"form": "gauge", "max_rank": 3})]
    abstract = nnx.eval_shape(lambda model: factorize(model, rules), dense)
    expected = factorize(dense, rules)
    assert nnx.graphdef(abstract) == nnx.graphdef(expected)
    traced = nnx.jit(lambda model: factorize(model, rules))(dense)
    assert relative_error(traced(jnp.ones((2, 6))), expected(jnp.ones((2, 6)))) <= 1e-5


WRONG_RULES = {
    "form": ({"form": "lu"}, r"form must be one of \['factored', 'gauge'\]"),
    "options": ({"form": "gauge", "depth": 3}, r"got \['depth'\]"),
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules_are_refused(case):
    rule, message = WRONG_RULES[case]
    with pytest.raises(UserError, match=message):
        factorize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), [("", rule)])


def test_it_works_abstractly_and_under_jit(kind):
    """The same shapes from `nnx.eval_shape`, the same function from `jax.jit`."""

    def build():
        return truncate(factored(kind), RANKS[kind], form="gauge")

    expected, abstract = build(), nnx.eval_shape(build)
    assert nnx.graphdef(abstract) == nnx.graphdef(expected)
    found = nnx.merge(nnx.graphdef(expected), jax.jit(lambda: nnx.state(build()))())
    assert relative_error(found(INPUTS), expected(INPUTS)) <= 1e-5


@pytest.mark.parametrize(
    "dtypes", [{"dtype": jnp.bfloat16}, {"param_dtype": "bfloat16"}]
)
def test_bfloat16_works(dtypes: dict[str, Any]):
    model = factorize(nnx.Linear(12, 10, rngs=nnx.Rngs(0), **dtypes))
    small = truncate(model, {"": 6})
    form = truncate(model, {"": 6}, form="gauge")
    x = jnp.ones((3, 12), jnp.bfloat16)
    assert form(x).dtype == small(x).dtype
    assert relative_error(np.float32(form(x)), np.float32(small(x))) <= 2e-2


def test_its_arrays_are_trained_and_its_order_is_not():
    """Gradients of the two arrays; `columns` is state."""
    form = gauge(Scanned)
    gradients = nnx.grad(lambda model: jnp.sum(model(INPUTS) ** 2))(form)
    paths = {path[-1] for path, _ in nnx.to_flat_state(gradients)}
    assert paths == {"u", "rest", "bias"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_the_table_names_its_forms():
    assert {name: kind.form for name, kind in FORMS.items()} == {
        "factored": "factored",
        "gauge": "gauge",
    }
