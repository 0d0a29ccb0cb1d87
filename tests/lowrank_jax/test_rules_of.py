"""What rules can ask of a layer, and the rules that a model gives back.

One net holds what makes this hard: shared modules, tied kernels, stacked layers, and
names that mean something in a regular expression.
"""

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.factorization import factorize, kernel_matrices, rules_of
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import canonicalize, merge, truncate


def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers by NumPy: Flax's initialisers compile anew for every shape."""
    traced = isinstance(key, jax.core.Tracer)
    seed = 0 if traced else np.asarray(jax.random.key_data(key))
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, dtype)


linear = functools.partial(nnx.Linear, kernel_init=draw, bias_init=draw)


class Net(nnx.Module):
    """Convolutions, shared and tied layers, a stack of three, and a norm."""

    def __init__(self, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_init=draw, rngs=rngs)
        self.conv = conv(2, 4, (3, 2))
        self.grouped = conv(4, 6, (2, 2), feature_group_count=2)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.by_name = nnx.data(
            {"a.b": linear(6, 4, rngs=rngs), "a+b": linear(4, 4, rngs=rngs)}
        )
        self.shared = linear(4, 4, rngs=rngs)
        self.again = self.shared
        self.tied = linear(4, 4, rngs=rngs)
        self.other = linear(4, 4, rngs=rngs)
        self.other.kernel = self.tied.kernel

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return linear(4, 4, rngs=rngs)

        self.stack = build(rngs)
        for scale, parameter in ((1.0, self.stack.kernel), (2.0, self.stack.bias)):
            sizes = jnp.arange(1.0, 4.0).reshape(3, *[1] * (parameter.ndim - 1))
            parameter.set_value(parameter[...] * scale / sizes)
        self.head = linear(4, 3, rngs=rngs)

    def __call__(self, images):
        hidden = self.norm(self.grouped(self.conv(images)))
        layers = [self.by_name["a.b"], self.by_name["a+b"], self.shared, self.again]
        for layer in (*layers, self.tied, self.other):
            hidden = jnp.tanh(layer(hidden))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, hidden):
            return jnp.tanh(layer(hidden))

        return self.head(run(self.stack, hidden))


PATHS = {
    *("again", "by_name/a.b", "by_name/a+b", "conv", "grouped", "head", "other"),
    *("stack", "tied"),
}
"""The first path of each layer; "shared" is another of "again"."""

MIXED = [
    ("conv", {"scheme": 2, "depth": 3}),
    ("grouped", {"max_rank": 2, "with_s": True}),
    (r"by_name/a\.b", "dense"),
    (r"by_name/a\+b", {"rank_fraction": 0.5}),
    ("shared", {"with_s": True, "max_rank": 3}),
    ("tied|other", {"depth": 4, "max_rank": 2}),
    ("stack", {"depth": 3}),
    ("head", "full"),
]
RULES = {
    "mixed": MIXED,
    "all full": [(".*", "full")],
    "all dense": [(".*", "dense")],
    "all scaled": [(".*", {"with_s": True})],
    "all deep, of rank 0": [(".*", {"depth": 3, "max_rank": 0})],
    "schemes": [
        ("conv", {"scheme": 1}),
        ("grouped", {"scheme": 3}),
        ("tied|other", "dense"),
        (".*", "full"),
    ],
    "random": [(".*", {"init": "random", "max_rank": 2, "with_s": True})],
}


@functools.cache
def dense_parts() -> tuple[Any, Any]:
    return nnx.split(Net(nnx.Rngs(0)))


def dense_net() -> nnx.Module:
    return nnx.merge(*dense_parts(), copy=True)


@functools.cache
def parts(case: str) -> tuple[Any, Any]:
    return nnx.split(factorize(dense_net(), RULES[case], rngs=nnx.Rngs(1)))


def net(case: str = "mixed") -> nnx.Module:
    return nnx.merge(*parts(case), copy=True)


def structure(model: nnx.Module) -> dict[str, Any]:
    """Every array's path, shape and dtype, with the graph that says what is shared."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    shapes = {"/".join(map(str, p)): (x.shape, str(x.dtype)) for p, x in flat}
    return {"graph": nnx.graphdef(model), **shapes}


@pytest.mark.parametrize("case", RULES)
def test_rules_make_the_structure_they_were_read_from(case):
    """From the dense twin, through JSON, also after a cut, and canonicalized."""
    model = net(case)
    lower = {p: min(1, x.max_rank) for p, x in find_factors(model).items()}
    cut = truncate(model, lower)
    for one in (model, cut, canonicalize(model)):
        rules = rules_of(one)
        assert json.loads(json.dumps(rules)) == [list(rule) for rule in rules]
        for again in (rules, json.loads(json.dumps(rules))):
            made = nnx.eval_shape(lambda again=again: factorize(dense_net(), again))
            assert structure(made) == structure(one)
            assert rules_of(made) == rules


def test_rules_tell_every_structure_from_the_others():
    """The control: no two of these models have the same rules, or structure; random
    factors differ in their numbers only."""
    structures = {case: structure(net(case)) for case in RULES}
    for one, other in itertools.combinations(RULES, 2):
        assert rules_of(net(one)) != rules_of(net(other))
        assert structures[one] != structures[other]
    assert {path for path in max_ranks(net("all full"))} == PATHS - {"tied"}


def test_rules_are_of_layers_and_say_all_there_is():
    """One for each low-rank layer, whose names are no patterns; then what is dense."""
    rules = dict(rules_of(net()))
    assert rules == {
        "again": {"max_rank": 3, "with_s": True, "depth": 2},
        r"by_name/a\+b": {"max_rank": 2, "with_s": False, "depth": 2},
        "conv": {"max_rank": 6, "with_s": False, "depth": 3, "scheme": 2},
        "grouped": {"max_rank": 2, "with_s": True, "depth": 2, "scheme": 0},
        "head": {"max_rank": 3, "with_s": False, "depth": 2},
        "other": {"max_rank": 2, "with_s": False, "depth": 4},
        "stack": {"max_rank": 4, "with_s": False, "depth": 3},
        "tied": {"max_rank": 2, "with_s": False, "depth": 4},
        ".*": "dense",
    }
    assert rules_of(dense_net()) == [(".*", "dense")]
    assert rules_of(nnx.LayerNorm(3, rngs=nnx.Rngs(0))) == []


def conv_matrix(kernel: np.ndarray, scheme: int, groups: int = 1) -> np.ndarray:
    """The matrices of a kernel (k1, k2, c, f), entry by entry."""
    k1, k2, channels, filters = kernel.shape
    per = filters // groups
    shape = {0: (k1 * k2 * channels, per), 2: (k1 * channels, k2 * per)}[scheme]
    result = np.zeros((groups, *shape))
    for a, b, c, f in np.ndindex(kernel.shape):
        group, n = divmod(f, per)
        row, column = {
            0: ((a * k2 + b) * channels + c, n),
            2: (a * channels + c, b * per + n),
        }[scheme]
        result[group, row, column] = kernel[a, b, c, f]
    return result if groups > 1 else result[0]


def folded_by_hand(model: nnx.Module, scheme: int) -> dict[str, np.ndarray]:
    kernels = {
        "by_name/a.b": model.by_name["a.b"],
        "by_name/a+b": model.by_name["a+b"],
        **{p: getattr(model, p) for p in ("again", "head", "other", "stack", "tied")},
    }
    matrices = {path: np.asarray(one.kernel[...]) for path, one in kernels.items()}
    conv, grouped = (np.asarray(x.kernel[...]) for x in (model.conv, model.grouped))
    matrices["conv"] = conv_matrix(conv, scheme)
    return {**matrices, "grouped": conv_matrix(grouped, 0, groups=2)}


def test_rules_that_say_the_same_leave_kernels_tied():
    """A default may be written out in one of them; another rank unties, an error."""
    short, long = {"max_rank": 2}, {"max_rank": 2, "with_s": False, "init": "svd"}
    rules = [("tied", short), ("other", long), (".*", "dense")]
    model = factorize(dense_net(), rules)
    assert model.tied.factors is model.other.factors
    with pytest.raises(ValueError, match="layers with one kernel must have one form"):
        factorize(dense_net(), [("tied", {**short, "depth": 3}), *rules[1:]])


def test_kernel_matrices_of_dense_layers_are_their_default_folds():
    """Bit for bit; one for each layer, tied kernels at both."""
    model = dense_net()
    found, expected = kernel_matrices(model), folded_by_hand(model, scheme=0)
    assert found.keys() == expected.keys() == PATHS
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], path)


def test_kernel_matrices_of_low_rank_layers_are_the_active_products():
    """By each layer's own fold, as merging gives them; full, and masked."""
    model = net()
    for ranks in ({}, {"conv": 1, "stack": [0, 2, 1], "grouped": [1, 0], "tied": 1}):
        set_ranks(model, {p: r for p, r in ranks.items() if p in max_ranks(model)})
        found = kernel_matrices(model)
        expected = folded_by_hand(merge(model), scheme=2)
        assert found.keys() == expected.keys()
        for path in found:
            assert relative_error(found[path], expected[path]) <= 1e-6
        for path, factors in find_factors(model).items():
            left, right = (np.float64(factors.arrays()[n]) for n in (0, 2))
            if factors.s is not None:
                left = left * np.abs(factors.s[...])[..., None, :]
            if not ranks:
                assert relative_error(found[path], left @ right) <= 1e-6


def test_layers_without_a_low_rank_form_have_no_matrix():
    """A masked convolution is passed over, the others stay."""
    rngs = nnx.Rngs(0)
    masked = nnx.Conv(2, 2, (1, 1), mask=jnp.ones((1, 1, 2, 2)), rngs=rngs)
    model = nnx.Sequential(masked, linear(2, 3, rngs=rngs))
    assert list(kernel_matrices(model)) == ["layers/1"]


@pytest.mark.parametrize(
    "paths", [[], ["conv"], ["other", "stack"], ["again"], None], ids=str
)
def test_merge_makes_the_named_layers_dense(paths):
    """Only these, with all layers that share their factors; the function stays."""
    model = net()
    set_ranks(model, {"conv": 2, "stack": [1, 3, 2], "again": 1})
    merged = merge(model, paths)
    factors = find_factors(model)
    left = {} if paths is None else {p: x for p, x in factors.items() if p not in paths}
    assert find_factors(merged).keys() == left.keys()
    for path, one in find_factors(merged).items():
        np.testing.assert_array_equal(one.u[...], left[path].u[...])
    assert merged.shared is merged.again
    if paths is None or "other" in paths:
        assert merged.tied.kernel is merged.other.kernel
    inputs = draw(jax.random.key(3), (2, 4, 4, 2))
    assert relative_error(merged(inputs), model(inputs)) <= 1e-5


def test_merge_refuses_unknown_paths():
    """All of them, with what there is."""
    with pytest.raises(ValueError, match=r"got \['body', 'tail'\].*'again'"):
        merge(net(), ["body", "conv", "tail"])


def test_random_factors_have_the_variance_of_the_kernel():
    """Of the product, whatever the rank; another product than the SVD's, and from
    rngs."""
    layer = nnx.Linear(160, 90, kernel_init=draw, rngs=nnx.Rngs(0))
    variance = np.var(np.float64(layer.kernel[...]))
    for rank, with_s in itertools.product((30, 90), (False, True)):
        rule = {"init": "random", "max_rank": rank, "with_s": with_s}
        matrices = [
            np.float64(
                factorize(layer, [(".*", rule)], rngs=nnx.Rngs(seed)).factors.matrix()
            )
            for seed in (0, 0, 1)
        ]
        one, again, other = matrices
        assert np.var(one) == pytest.approx(variance, rel=0.1)
        assert abs(one.mean()) < 0.1 * np.sqrt(variance)
        assert np.linalg.matrix_rank(one, rtol=1e-5) == rank
        np.testing.assert_array_equal(one, again)
        assert relative_error(one, other) > 1
        assert relative_error(one, layer.kernel[...]) > 1
    model = net("random")
    assert model.tied.factors is model.other.factors
    stack = np.float64(model.stack.factors.u[...])
    assert relative_error(stack[0], stack[1]) > 0.5


def test_spectral_initialisation_is_the_default():
    """The nearest matrix of its rank, and no random number is asked for."""
    layer = linear(6, 4, rngs=nnx.Rngs(0))
    first, second = (
        factorize(layer, [(".*", rule)]).factors.matrix()
        for rule in ({"max_rank": 2}, {"max_rank": 2, "init": "svd"})
    )
    np.testing.assert_array_equal(first, second)
    u, s, v = np.linalg.svd(np.float64(layer.kernel[...]), full_matrices=False)
    assert relative_error(first, (u[:, :2] * s[:2]) @ v[:2]) <= 1e-5


WRONG = {
    "scales and depth": ({"with_s": True, "depth": 3}, "with_s=True"),
    "depth 1": ({"depth": 1}, "depth: must be 2"),
    "depth 2.0": ({"depth": 2.0}, "depth must be a whole number.*got 2.0"),
    "depth true": ({"depth": True}, "depth must be a whole number.*got True"),
    "with_s text": ({"with_s": "yes"}, "with_s must be true or false, got 'yes'"),
    "with_s list": ({"with_s": [True]}, r"with_s must be true or false, got \[True\]"),
    "key": ({"rank": 2}, r"mapping of \['depth', 'form', 'init'.*got \{'rank': 2\}"),
    "init": ({"init": "zeros"}, "init must be 'svd' or 'random', got 'zeros'"),
    "no rngs": ({"init": "random"}, "needs rngs.*Pass factorize"),
    "random, deep": ({"init": "random", "depth": 3}, "depth of 2.*depth=3"),
    "scheme": ({"scheme": 0}, "scheme is for convolutions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_name_every_layer(case):
    """One ValueError, a line for each layer; the others are not named."""
    rule, message = WRONG[case]
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(*(linear(4, 4, rngs=rngs) for _ in range(3)))
    rules = [("layers/[02]", rule), (".*", "dense")]
    with pytest.raises(ValueError, match=message) as error:
        factorize(model, rules)
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["layers/0", "layers/2"]


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_kernels_with_nan_or_infinity_are_refused(value, init):
    """By the path of each layer; nothing would say later where a NaN came from. Dense,
    the layer may stay."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(*(linear(4, 4, rngs=rngs) for _ in range(3)))
    model.layers[1].kernel.set_value(model.layers[1].kernel[...].at[2, 1].set(value))
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        factorize(model, [(".*", {"init": init})], rngs=rngs)
    assert str(error.value).startswith("layers/1: ")
    assert "layers/0" not in str(error.value)
    factorize(model, [("layers/1", "dense"), (".*", {"init": init})], rngs=rngs)
