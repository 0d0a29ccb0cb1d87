"""Products of more than two factors (LoRITa), and scales in convolutions.

Every expected value is a chain of matrices, or a convolution pixel by pixel, in NumPy
float64. Middle factors are random here: the diagonal ones that a kernel starts with
would hide a transposed, swapped or unmasked one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import convolve, relative_error, spectrum_error

from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, set_ranks
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import canonicalize, merge, truncate

SHAPES = {"tall": (6, 4), "wide": (3, 5)}  # joined into v, and into u
STACKS = {"one": (), "stacked": (2,), "stacked groups": (2, 3)}
CASES = [
    pytest.param(shape, stack, depth, id=f"{name}, {kind}, depth {depth}")
    for name, shape in SHAPES.items()
    for kind, stack in STACKS.items()
    for depth in (3, 4)
]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers, as an initialiser too (which Flax calls with a key first)."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make(shape: tuple[int, int], stack: tuple[int, ...], depth: int) -> Factors:
    """Random factors, none of them diagonal or symmetric."""
    rank = min(shape)
    return Factors(
        draw(*stack, shape[0], rank),
        draw(*stack, rank, shape[1], seed=1),
        middle=draw(*stack, depth - 2, rank, rank, seed=2),
    )


def chain_of(factors: Factors) -> list[np.ndarray]:
    """The matrices of the product, left to right, in float64."""
    u, middle, v = (
        np.asarray(part[...], np.float64)
        for part in (factors.u, factors.middle, factors.v)
    )
    return [u, *np.moveaxis(middle, -3, 0), v]


def product(factors: Factors, rank: Any) -> np.ndarray:
    """The chain of the leading `rank` columns and rows, matrix by matrix of a stack."""
    chain = chain_of(factors)
    ranks = np.broadcast_to(rank, factors.stack_shape)
    result = np.zeros((*factors.stack_shape, factors.in_size, factors.out_size))
    for index in np.ndindex(factors.stack_shape):
        u, *middle, v = (part[index] for part in chain)
        r = ranks[index]
        squares = [square[:r, :r] for square in middle]
        result[index] = np.linalg.multi_dot([u[:, :r], *squares, v[:r]])
    return result


def mixed_ranks(stack: tuple[int, ...], rank: int, start: int = 0) -> np.ndarray:
    """Another rank for each matrix of a stack."""
    count = np.prod(stack, dtype=int)
    return (start + np.arange(count)).reshape(stack) % (rank + 1)


@pytest.mark.parametrize(("shape", "stack", "depth"), CASES)
def test_the_factors_of_a_matrix_share_its_spectrum(shape, stack, depth):
    """Full depth is the matrix, fewer columns its nearest; the squared norms add up to
    N sum s^(2/N), the least there is: the Schatten-2/N quasi-norm of LoRITa."""
    matrix = draw(*stack, *shape)
    spectrum = np.linalg.svd(np.float64(matrix), compute_uv=False)
    for rank in (0, 2, min(shape)):
        factors = Factors.from_matrix(matrix, rank, depth=depth)
        assert factors.depth == depth and factors.max_rank == rank
        assert factors.middle.shape == (*stack, depth - 2, rank, rank)
        distance = np.linalg.norm(matrix - factors.matrix(), axis=(-2, -1))
        np.testing.assert_allclose(distance, spectrum_error(matrix, rank), atol=1e-5)
        norms = sum(np.square(part).sum((-2, -1)) for part in chain_of(factors))
        least = depth * (spectrum[..., :rank] ** (2 / depth)).sum(-1)
        np.testing.assert_allclose(norms, least, rtol=1e-5)
    assert relative_error(factors.matrix(), matrix) <= 1e-5


@pytest.mark.parametrize(("shape", "stack", "depth"), CASES)
def test_masked_is_cut_is_the_chain_of_the_leading_parts(shape, stack, depth):
    """For every rank and one of each matrix; with two squares or more, masking the
    outer factors only is not."""
    rank = min(shape)
    for ranks in [*range(rank + 1), mixed_ranks(stack, rank).tolist()]:
        masked, cut = (make(shape, stack, depth) for _ in range(2))
        masked.set_rank(ranks)
        expected = product(masked, ranks)
        assert relative_error(masked.matrix(), expected) <= 1e-6
        cut.cut(ranks)
        allocated = np.max(ranks)
        assert cut.middle.shape == (*stack, depth - 2, allocated, allocated)
        assert cut.depth == depth and cut.max_rank == allocated
        assert relative_error(cut.matrix(), expected) <= 1e-6
    masked.set_rank(1)
    u, *middle, v = chain_of(masked)
    u, v = u * (np.arange(rank) < 1), v * (np.arange(rank) < 1)[:, None]
    outer = functools.reduce(np.matmul, [u, *middle, v])
    assert (relative_error(outer, masked.matrix()) > 1e-2) == (depth > 3)


@pytest.mark.parametrize(("shape", "stack", "depth"), CASES)
def test_arrays_are_two_factors_of_the_whole_chain(shape, stack, depth):
    """All allocated columns, whatever the active rank; the smaller side takes the
    squares, so that nothing becomes larger than it was."""
    factors = make(shape, stack, depth)
    factors.set_rank(1)
    u, s, v = factors.arrays()
    assert s is None and (u.shape, v.shape) == (factors.u.shape, factors.v.shape)
    assert relative_error(np.float64(u) @ np.float64(v), product(factors, 99)) <= 1e-6
    kept = (v, factors.v) if shape[0] <= shape[1] else (u, factors.u)
    np.testing.assert_array_equal(kept[0], kept[1][...])


@pytest.mark.parametrize(("shape", "stack", "depth"), CASES)
def test_gradients_follow_the_chain_rule_and_are_zero_in_the_tail(shape, stack, depth):
    """Exactly zero past the rank, in rows and columns; before it, those of NumPy."""
    rank = min(shape)
    factors = make(shape, stack, depth)
    ranks = np.maximum(mixed_ranks(stack, rank, start=2), 1)
    factors.set_rank(ranks.tolist())
    graph, params, rest = nnx.split(factors, nnx.Param, ...)
    target = draw(*stack, *shape, seed=3)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(target * nnx.merge(graph, params, rest).matrix())

    found = {k: np.asarray(x) for k, x in nnx.to_pure_dict(gradient(params)).items()}
    found = [found["u"], *np.moveaxis(found["middle"], -3, 0), found["v"]]
    for index in np.ndindex(stack):
        r = ranks[index]
        u, *middle, v = (part[index] for part in chain_of(factors))
        parts = [u[:, :r], *(square[:r, :r] for square in middle), v[:r]]
        for number, part in enumerate(found):
            inner = np.float64(target[index])  # left^T target right^T
            for one in parts[:number]:
                inner = one.T @ inner
            for one in reversed(parts[number + 1 :]):
                inner = inner @ one.T
            expected = np.zeros(part[index].shape)
            expected[: inner.shape[0], : inner.shape[1]] = inner
            np.testing.assert_array_equal(part[index] != 0, expected != 0)
            assert relative_error(part[index], expected) <= 1e-5


def test_ranks_of_deep_factors_recompile_nothing():
    """One program for all of them, and they do differ."""
    factors = make((6, 4), (2,), 4)
    traces = []

    @jax.jit
    def run(state):
        traces.append(None)
        return nnx.merge(graph, state).matrix()

    graph, state = nnx.split(factors)
    for ranks in (4, 3, [0, 2], [4, 1], 0):
        factors.set_rank(ranks)
        assert nnx.graphdef(factors) == graph
        found = run(nnx.state(factors))
        assert relative_error(found, product(factors, ranks)) <= 1e-6
    assert len(traces) == 1


@pytest.mark.parametrize(("shape", "stack", "depth"), CASES)
def test_canonical_factors_are_two_and_every_prefix_is_the_best(shape, stack, depth):
    """Eckart-Young of the product at the active rank; before it, prefixes are not."""
    rank = min(shape)
    factors = make(shape, stack, depth)
    assert np.all(
        np.linalg.norm(product(factors, 1) - product(factors, rank), axis=(-2, -1))
        > 1.1 * spectrum_error(product(factors, rank), 1)
    )
    for active in (rank - 1, rank):
        factors = make(shape, stack, depth)
        factors.set_rank(active)
        matrix = product(factors, active)
        factors.canonicalize()
        assert factors.middle is None and factors.depth == 2
        size = np.linalg.norm(matrix)
        for prefix in range(active + 1):
            factors.set_rank(prefix)
            error = np.linalg.norm(matrix - factors.matrix(), axis=(-2, -1))
            best = spectrum_error(matrix, prefix)
            np.testing.assert_allclose(error, best, atol=1e-5 * size)


def test_deep_factors_take_no_rank_per_example():
    """A mask of the hidden activations cannot reach between the factors."""
    factors = make((6, 4), (), 3)
    factors.set_rank(3)
    with pytest.raises(ValueError, match="no rank per example.*canonicalize first"):
        factors.set_rank(jnp.array([1, 2]))
    assert factors.get_rank() == 3 and not factors.per_example
    factors.canonicalize()
    factors.set_rank(jnp.array([1, 2]))
    assert factors.per_example


@pytest.mark.parametrize(
    ("middle", "s"),
    [
        ((1, 4, 3), None),
        ((1, 5, 5), None),
        ((4, 4), None),
        ((2, 1, 4, 4), None),
        ((1, 4, 4), (4,)),
    ],
)
def test_middle_factors_that_do_not_fit_are_an_error(middle, s):
    """Square, of the rank's size, in the same stack, and never beside scales."""
    with pytest.raises(ValueError, match=r"middle must be \(\*stack, n, r, r\)"):
        Factors(draw(6, 4), draw(4, 5), s and draw(*s), draw(*middle))


@pytest.mark.parametrize(
    ("depth", "with_s"), [(1, False), (0, False), (3, True), (1, True)]
)
def test_depths_that_do_not_exist_are_an_error(depth, with_s):
    with pytest.raises(ValueError, match=f"depth: must be 2.*got {depth}"):
        Factors.from_matrix(draw(6, 4), 2, depth=depth, with_s=with_s)


class Net(nnx.Module):
    """Convolutions (by scheme 0, by scheme 2, in groups), and layers of both shapes."""

    def __init__(self, rngs: nnx.Rngs):
        def init(key, shape, dtype):
            return draw(*shape) / 2

        conv = functools.partial(nnx.Conv, kernel_init=init, bias_init=init, rngs=rngs)
        linear = functools.partial(
            nnx.Linear, kernel_init=init, bias_init=init, rngs=rngs
        )
        self.channel = conv(2, 4, (3, 2), strides=2, padding=1)
        self.spatial = conv(4, 4, (2, 3), strides=(1, 2), padding="VALID")
        self.grouped = conv(4, 6, (2, 2), feature_group_count=2, padding="VALID")
        self.tall = linear(6, 4)
        self.wide = linear(4, 7)

    def __call__(self, images):
        hidden = self.grouped(jnp.tanh(self.spatial(jnp.tanh(self.channel(images)))))
        return self.wide(jnp.tanh(self.tall(jnp.tanh(hidden))))


RULES = [("spatial", {"depth": 4, "scheme": 2}), (".*", {"depth": 3})]
FULL = {"channel": 4, "grouped": [3, 3], "spatial": 8, "tall": 4, "wide": 4}
MIXED = {"channel": 2, "grouped": [3, 1], "spatial": 5, "tall": 3, "wide": 1}
PROFILES = [
    *({p: min(r, n) if p != "grouped" else [min(3, n)] * 2 for p, r in FULL.items()}
      for n in (*range(5), 6)),
    MIXED,
    FULL,
]  # fmt: skip


def images(batch: int) -> jax.Array:
    return draw(batch, 7, 8, 2, seed=5)


@functools.cache
def parts() -> tuple[Any, Any]:
    return nnx.split(factorize(Net(nnx.Rngs(0)), RULES))


def deep_net(*, trained: bool = True) -> nnx.Module:
    """The factorized net; "trained" moves the squares away from diagonal ones."""
    model = nnx.merge(*parts(), copy=True)
    for number, factors in enumerate(find_factors(model).values()):
        noise = draw(*factors.middle.shape, seed=number) / 3
        factors.middle.set_value(factors.middle[...] + noise * trained)
    return model


def conv_kernel(matrix: np.ndarray, shape: tuple[int, ...], scheme: int) -> np.ndarray:
    """A kernel (k1, k2, c, f) from its matrix, or matrices of groups, by hand."""
    k1, k2, c, f = shape
    if scheme == 2:
        return matrix.reshape(k1, c, k2, f).transpose(0, 2, 1, 3)
    groups = matrix.reshape(-1, k1, k2, c, matrix.shape[-1])
    return groups.transpose(1, 2, 3, 0, 4).reshape(shape)


def numpy_net(model: nnx.Module, inputs: Any, ranks: dict[str, Any]) -> np.ndarray:
    """The net on chains of leading parts, in float64."""
    matrices = {p: product(one, ranks[p]) for p, one in find_factors(model).items()}
    hidden = np.float64(inputs)
    convs = {  # kernel, scheme, strides, padding, groups
        "channel": ((3, 2, 2, 4), 0, (2, 2), ((1, 1), (1, 1)), 1),
        "spatial": ((2, 3, 4, 4), 2, (1, 2), ((0, 0), (0, 0)), 1),
        "grouped": ((2, 2, 2, 6), 0, (1, 1), ((0, 0), (0, 0)), 2),
    }
    for path, (shape, scheme, strides, padding, groups) in convs.items():
        kernel = conv_kernel(matrices[path], shape, scheme)
        hidden = convolve(
            hidden, kernel, strides=strides, padding=padding, groups=groups
        )
        hidden = np.tanh(hidden + np.float64(getattr(model, path).bias[...]))
    hidden = np.tanh(hidden @ matrices["tall"] + np.float64(model.tall.bias[...]))
    return hidden @ matrices["wide"] + np.float64(model.wide.bias[...])


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, inputs):
    return nnx.merge(graph, state)(inputs)


def outputs_of(model: nnx.Module, inputs: jax.Array) -> jax.Array:
    graph, state = nnx.split(model)
    return run(graph, nnx.as_pure(state), inputs)


def test_a_deep_model_is_its_dense_twin():
    """At full depth and rank, in function and merged back."""
    model, dense = deep_net(trained=False), Net(nnx.Rngs(0))
    assert get_ranks(model) == FULL
    depths = {path: one.depth for path, one in find_factors(model).items()}
    assert depths == {**dict.fromkeys(FULL, 3), "spatial": 4}
    expected = outputs_of(dense, images(2))
    assert relative_error(outputs_of(model, images(2)), expected) <= 1e-5
    back = merge(model)
    assert nnx.graphdef(back) == nnx.graphdef(dense)
    assert relative_error(outputs_of(back, images(2)), expected) <= 1e-5


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("ranks", PROFILES, ids=lambda r: f"spatial {r['spatial']}")
def test_masked_is_truncated_is_merged_is_numpy(ranks, batch):
    """At every rank down to 0, for few inputs (one factor after the other) and many."""
    model, inputs = deep_net(), images(batch)
    small = truncate(model, ranks)
    set_ranks(model, ranks)
    expected = numpy_net(model, inputs, ranks)
    assert relative_error(outputs_of(model, inputs), expected) <= 1e-5
    assert relative_error(outputs_of(small, inputs), expected) <= 1e-5
    assert relative_error(outputs_of(merge(small), inputs), expected) <= 1e-5


def test_a_canonical_deep_model_keeps_its_function():
    """Of the masked model; and it is deep no more."""
    model = deep_net()
    set_ranks(model, MIXED)
    canonical = canonicalize(model)
    assert {one.depth for one in find_factors(canonical).values()} == {2}
    assert {one.depth for one in find_factors(model).values()} == {3, 4}
    found, expected = outputs_of(canonical, images(2)), outputs_of(model, images(2))
    assert relative_error(found, expected) <= 1e-5


def test_a_deep_checkpoint_comes_back_bit_for_bit(tmp_path):
    """Onto a structure made by the rules it carries; at lower ranks it is truncated."""
    model = deep_net()
    set_ranks(model, MIXED)
    checkpoint.save(tmp_path / "deep", model)
    saved = checkpoint.open_checkpoint(tmp_path / "deep")
    structure = nnx.eval_shape(
        lambda: factorize(Net(nnx.Rngs(1)), saved.metadata["rank_rules"])
    )
    found = checkpoint.load(saved, structure)
    assert nnx.graphdef(found) == nnx.graphdef(model) and get_ranks(found) == MIXED
    np.testing.assert_array_equal(
        outputs_of(found, images(2)), outputs_of(model, images(2))
    )
    lower = {**MIXED, "tall": 0, "grouped": [2, 1]}
    small = checkpoint.load(saved, structure, ranks=lower)
    expected = truncate(model, lower)
    assert nnx.graphdef(small) == nnx.graphdef(expected)
    states = (jax.tree.leaves(nnx.state(x, nnx.Param)) for x in (small, expected))
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(
        outputs_of(small, images(2)), outputs_of(expected, images(2))
    )


SAME = {1: ((1, 1), (0, 1)), 2: ((1, 1), (0, 0))}
"""By stride: what a kernel 3 x 2 adds to an image 7 x 6 before and after each axis."""


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scheme", [0, 2], ids=["channel-wise", "spatial-wise"])
def test_scaled_factors_are_one_convolution(scheme, stride, padding):
    """SVD training (Yang et al., 2020): U diag(|s|) V^T is the recomposed kernel, for
    scales of both signs, at every rank, by one convolution after the other or merged.
    """
    rule = [(".*", {"with_s": True, "scheme": scheme})]
    conv = functools.partial(nnx.Conv, rngs=nnx.Rngs(0))
    layer = conv(3, 4, (3, 2), strides=stride, padding=padding, use_bias=False)
    layer = factorize(layer, rule)
    factors = layer.factors
    factors.s.set_value(draw(factors.max_rank, seed=1))
    assert np.ptp(np.sign(factors.s[...])) == 2
    u, s, v = (np.asarray(x[...], float) for x in (factors.u, factors.s, factors.v))
    around = SAME[stride] if padding == "SAME" else ((0, 0), (0, 0))
    for rank in (0, 1, 3, factors.max_rank):
        factors.set_rank(rank)
        matrix = (u[:, :rank] * np.abs(s[:rank])) @ v[:rank]
        kernel = conv_kernel(matrix, (3, 2, 3, 4), scheme)
        assert relative_error(layer.merged_kernel(), kernel) <= 1e-6
        for batch in (1, 8):
            inputs = draw(batch, 7, 6, 3, seed=2)
            expected = convolve(
                inputs, kernel, strides=(stride, stride), padding=around
            )
            assert relative_error(layer(inputs), expected) <= 1e-5
