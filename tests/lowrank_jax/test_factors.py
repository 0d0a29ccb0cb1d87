"""`Factors`: masks, ranks, cuts and gradients of one matrix or a stack of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error, spectrum_error

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors, Rank

STACKS = {"one": (), "stacked": (2,), "stacked groups": (2, 3)}
I, R, O = 5, 3, 4  # noqa: E741


def random(*shape: int, seed: int = 0) -> jax.Array:
    draw = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(draw, jnp.float32)


def make(stack: tuple[int, ...] = (), *, with_s: bool = False) -> Factors:
    s = random(*stack, R, seed=2) if with_s else None  # of both signs
    return Factors(random(*stack, I, R), random(*stack, R, O, seed=1), s)


def product(factors: Factors, rank) -> np.ndarray:
    """`u diag(|s|) v` over the first `rank` columns, by NumPy in float64."""
    u, s, v = (None if x is None else np.asarray(x, float) for x in factors.arrays())
    u = u if s is None else u * np.abs(s)[..., None, :]
    active = np.arange(R) < np.broadcast_to(rank, factors.stack_shape)[..., None]
    return (u * active[..., None, :]) @ v


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_matrix_is_the_product_of_the_active_columns(stack, with_s):
    """For every rank, and for a rank of each matrix of a stack."""
    factors = make(stack, with_s=with_s)
    assert factors.max_rank == R and factors.stack_shape == stack
    assert (factors.in_size, factors.out_size) == (I, O)
    mixed = np.arange(np.prod(stack, dtype=int)).reshape(stack) % (R + 1)
    for rank in [*range(R + 1), mixed.tolist()]:
        factors.set_rank(rank)
        assert relative_error(factors.matrix(), product(factors, rank)) <= 1e-6


def test_a_new_factor_is_at_full_rank():
    factors = make((2,))
    assert factors.get_rank() == [R, R] and factors.rank[...].dtype == jnp.int32
    assert bool(factors.mask().all())


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_from_matrix_is_the_nearest_of_its_rank(stack, with_s):
    """Eckart-Young, with or without the singular values apart."""
    matrix = random(*stack, I, O)
    for rank in range(min(I, O) + 1):
        factors = Factors.from_matrix(matrix, rank, with_s=with_s)
        assert factors.max_rank == rank and (factors.s is None) != with_s
        distance = np.linalg.norm(matrix - factors.matrix(), axis=(-2, -1))
        np.testing.assert_allclose(distance, spectrum_error(matrix, rank), atol=1e-5)
        if with_s:  # the singular values stand in s, in order
            expected = np.linalg.svd(matrix, compute_uv=False)[..., :rank]
            np.testing.assert_allclose(factors.s[...], expected, rtol=1e-4)


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_tail_gets_exactly_zero_gradient(stack, with_s):
    """And every number before it gets some."""
    factors = make(stack, with_s=with_s)
    ranks = 1 + np.arange(np.prod(stack, dtype=int)).reshape(stack) % R
    factors.set_rank(ranks.tolist())
    graph, params, rest = nnx.split(factors, nnx.Param, ...)
    target = random(*stack, I, O, seed=3)

    def loss(params):
        return jnp.sum(target * nnx.merge(graph, params, rest).matrix())

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    active = np.arange(R) < ranks[..., None]
    for name in gradient:
        columns = np.asarray(gradient[name])
        if name != "s":
            columns = np.abs(columns).sum(-2 if name == "u" else -1)
        np.testing.assert_array_equal(columns != 0, active, err_msg=name)


def test_cut_keeps_the_product_and_drops_the_columns():
    """Masked at r is cut to r; the parameters keep kind, order and values."""
    for rank, with_s in itertools.product(range(R + 1), [False, True]):
        masked, cut = make(with_s=with_s), make(with_s=with_s)
        masked.set_rank(rank)
        cut.cut(rank)
        assert cut.max_rank == rank == cut.get_rank()
        assert relative_error(cut.matrix(), masked.matrix()) <= 1e-6
        for name in ("u", "v", "s")[: 2 + with_s]:
            assert type(getattr(cut, name)) is nnx.Param
        np.testing.assert_array_equal(cut.u[...], masked.u[..., :rank])


def test_cut_twice_is_cut_once():
    once, twice = make(with_s=True), make(with_s=True)
    once.cut(1)
    twice.cut(2)
    twice.cut(1)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(twice), nnx.state(once))


def test_cutting_a_stack_allocates_its_largest_rank():
    """Members below it are masked; a stack of zeros keeps no column."""
    factors = make((2,))
    expected = product(factors, [0, 2])
    factors.cut([0, 2])
    assert factors.max_rank == 2 and factors.get_rank() == [0, 2]
    assert relative_error(factors.matrix(), expected) <= 1e-6
    factors.cut([0, 0])
    assert factors.max_rank == 0
    np.testing.assert_array_equal(factors.matrix(), np.zeros((2, I, O)))


@pytest.mark.parametrize(
    ("stack", "rank", "expected"),
    [
        ((), 2, 2),
        ((), jnp.int32(1), 1),
        ((2,), 1, [1, 1]),
        ((2,), [0, 3], [0, 3]),
        ((2, 3), [[0, 1, 2], [3, 0, 1]], [[0, 1, 2], [3, 0, 1]]),
        ((2, 3), 2, [[2, 2, 2], [2, 2, 2]]),
    ],
)
def test_ranks_are_read_as_they_were_set(stack, rank, expected):
    factors = make(stack)
    factors.set_rank(rank)
    assert factors.get_rank() == expected and not factors.per_example
    assert factors.rank[...].dtype == jnp.int32 and factors.rank.shape == stack


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_ranks_per_example_mask_the_hidden_activations(stack):
    """Example b keeps the first `rank[..., b]` of them, whatever lies between."""
    factors = make(stack)
    ranks = np.arange(np.prod(stack, dtype=int) * 4).reshape(*stack, 4) % (R + 1)
    factors.set_rank(jnp.asarray(ranks))
    assert factors.per_example
    hidden = random(*stack, 4, 2, 2, R)
    active = (np.arange(R) < ranks[..., None])[..., None, None, :]
    np.testing.assert_array_equal(
        factors.mask_hidden(hidden), np.asarray(hidden) * active
    )
    factors.set_rank(1)
    assert not factors.per_example and factors.mask_hidden(hidden) is hidden


def test_ranks_per_example_cannot_be_merged():
    factors = make()
    factors.set_rank(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="one number to merge the factors"):
        factors.matrix()


def test_ranks_per_example_have_no_canonical_form():
    """The function would change; the arrays stay."""
    factors = make()
    before = factors.u[...]
    factors.set_rank(jnp.array([1, 2]))
    with pytest.raises(UserError, match="one number to have a canonical form, got one"):
        factors.canonicalize()
    np.testing.assert_array_equal(factors.u[...], before)


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize(
    ("stack", "active", "asked", "expected"),
    [
        ((), 2, 3, 2),
        ((), 3, 1, 1),
        ((2,), [1, 3], 2, [1, 2]),
        ((2,), [1, 3], np.array([2, 3]), [1, 3]),
    ],
)
def test_a_cut_raises_no_traced_rank(stack, active, asked, expected, with_s):
    """The lower of the two acts, matrix by matrix; past it everything is zero."""
    factors = make(stack, with_s=with_s)
    factors.set_rank(active)
    wanted = product(factors, expected)

    @nnx.jit
    def cut(factors):
        factors = nnx.clone(factors)
        factors.cut(asked)
        return factors

    small = cut(factors)
    assert small.max_rank == np.max(asked) and small.get_rank() == expected
    np.testing.assert_allclose(small.matrix(), wanted, atol=1e-5)
    tail = np.arange(small.max_rank) >= np.asarray(expected)[..., None]
    left = np.where(tail[..., None, :], small.u[...], 0)
    np.testing.assert_array_equal(left, 0)


def test_a_cut_lowers_traced_ranks_per_example_to_the_highest():
    factors = make()
    factors.set_rank(jnp.array([1, 2, 0]))

    @nnx.jit
    def cut(factors):
        factors = nnx.clone(factors)
        factors.cut(3)
        return factors

    assert cut(factors).get_rank() == 2


def test_ranks_that_are_known_stay_known_under_a_trace():
    """New factors, and plain ranks that are set, whatever traces them."""
    known = []

    @jax.jit
    def trace(u, v):
        factors = Factors(u, v)
        known.append(factors.get_rank())
        factors.set_rank(np.array(1))
        known.append(factors.get_rank())
        return factors.matrix()

    factors = make()
    trace(factors.u[...], factors.v[...])
    assert known == [factors.max_rank, 1]


def test_a_batch_of_another_size_is_an_error():
    factors = make()
    factors.set_rank(jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match="got 3 for a batch of 2"):
        factors.mask_hidden(jnp.ones((2, R)))


@pytest.mark.parametrize("ranks", [np.ones((3, 4), int), np.ones(3, int)])
def test_ranks_that_do_not_fit_the_stack_are_an_error(ranks):
    with pytest.raises(ValueError, match="^rank: must be one number, or an array of"):
        make((2,)).set_rank(jnp.asarray(ranks))


@pytest.mark.parametrize(
    ("u", "v", "s"),
    [
        ((5, 3), (4, 3), None),
        ((5, 3), (2, 4), None),
        ((2, 5, 3), (3, 3, 4), None),
        ((5, 3), (3, 4), (2,)),
        ((2, 5, 3), (2, 3, 4), (3,)),
    ],
)
def test_factors_that_do_not_fit_are_an_error(u, v, s):
    with pytest.raises(ValueError, match="must agree in stack and r, got"):
        Factors(jnp.ones(u), jnp.ones(v), None if s is None else jnp.ones(s))


@pytest.mark.parametrize(
    ("stack", "rank_shape"), [((), (2,)), ((2,), ()), ((2,), (2, 4))]
)
def test_a_rank_of_the_wrong_number_of_axes_is_an_error(stack, rank_shape):
    """What a transform leaves behind when it does not map the ranks."""
    factors = make(stack)
    factors.rank.set_value(jnp.ones(rank_shape, jnp.int32))
    with pytest.raises(ValueError, match=r"nnx\.StateAxes\(\{\(nnx\.Param, Rank\): 0"):
        factors.mask()


def test_the_rank_is_no_parameter():
    """Optimizers, which take `nnx.Param`, never see it."""
    state = nnx.state(make(with_s=True), nnx.Param)
    assert set(nnx.to_pure_dict(state)) == {"u", "s", "v"}
    assert len(jax.tree.leaves(nnx.state(make(), Rank))) == 1


@pytest.mark.parametrize("form", ["s", "middle"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_what_is_masked_becomes_zero_at_a_traced_rank(stack, form):
    """The product stays, and its arrays are those of a cut with zeros behind."""
    if form == "s":
        factors = make(stack, with_s=True)
    else:
        middle = random(*stack, 2, R, R, seed=3)
        factors = Factors(
            random(*stack, I, R), random(*stack, R, O, seed=1), None, middle
        )
    mixed = np.arange(np.prod(stack, dtype=int)).reshape(stack) % (R + 1)
    graphdef, state = nnx.split(factors)

    @jax.jit
    def zeroed(rank):
        traced = nnx.merge(graphdef, state, copy=True)
        traced.set_rank(rank)
        traced.zero_masked()
        return nnx.state(traced)

    for rank in [*(np.full(stack, r) for r in range(R + 1)), mixed]:
        found = nnx.merge(graphdef, zeroed(jnp.asarray(rank, jnp.int32)))
        factors.set_rank(rank.tolist())
        np.testing.assert_array_equal(found.matrix(), factors.matrix())
        tail = np.arange(R) >= rank[..., None]
        for name, axes in factors.rank_axes.items():
            if getattr(factors, name) is None:
                continue
            array = np.array(getattr(factors, name)[...])
            for axis in axes:
                shape = [*stack, *[1] * (array.ndim - len(stack))]
                shape[axis] = R
                array = np.where(tail.reshape(shape), 0, array)
            np.testing.assert_array_equal(getattr(found, name)[...], array)


def test_ranks_per_example_keep_what_one_example_reaches():
    factors = make()
    before = np.array(factors.u[...])
    factors.set_rank(jnp.asarray([1, 2, 0]))
    factors.zero_masked()
    np.testing.assert_array_equal(factors.u[:, :2], before[:, :2])
    assert not np.any(factors.u[:, 2:]) and not np.any(factors.v[2:])
