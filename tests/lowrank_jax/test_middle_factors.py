"""Products of more than two factors (LoRITa).

Every expected value is a chain of matrices in NumPy float64. Middle factors are random
here: the diagonal ones that a kernel starts with would hide a transposed, swapped or
unmasked one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import chain_of, draw, product
from flax import nnx
from reference import relative_error, spectrum_error

from lowrank_jax.factors import Factors

SHAPES = {"tall": (6, 4), "wide": (3, 5)}  # joined into v, and into u
STACKS = {"one": (), "stacked": (2,), "stacked groups": (2, 3)}
CASES = [
    pytest.param(shape, stack, depth, id=f"{name}, {kind}, depth {depth}")
    for name, shape in SHAPES.items()
    for kind, stack in STACKS.items()
    for depth in (3, 4)
]


def make(shape: tuple[int, int], stack: tuple[int, ...], depth: int) -> Factors:
    """Random factors, none of them diagonal or symmetric."""
    rank = min(shape)
    return Factors(
        draw(*stack, shape[0], rank),
        draw(*stack, rank, shape[1], seed=1),
        middle=draw(*stack, depth - 2, rank, rank, seed=2),
    )


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
