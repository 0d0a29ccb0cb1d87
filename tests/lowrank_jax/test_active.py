"""The active ranks of a model: checked whatever they come as, and given back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.active import at_ranks, get_ranks, max_ranks, rank_limits, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.paths import find_factors


class Net(nnx.Module):
    """A linear layer under two names, and a convolution in two groups."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.same = self.first
        self.groups = nnx.Conv(4, 6, (1,), feature_group_count=2, rngs=rngs)

    def __call__(self, inputs):
        return self.groups(self.first(inputs)[:, None])[:, 0]


@pytest.fixture
def model() -> nnx.Module:
    return factorize(Net(nnx.Rngs(0)))


FULL = {"first": 4, "groups": [2, 2]}

GIVEN = {
    "plain": ({"first": 2, "groups": [0, 1]}, {"first": 2, "groups": [0, 1]}),
    "one number": ({"groups": 1}, {"first": 4, "groups": [1, 1]}),
    "alias": ({"same": 1}, {"first": 1, "groups": [2, 2]}),
    "arrays": (
        {"first": jnp.int32(3), "groups": np.array([1, 0])},
        {"first": 3, "groups": [1, 0]},
    ),
    "per example": (
        {"first": np.array([1, 4, 0]), "groups": jnp.array([[0, 1], [2, 2]])},
        {"first": [1, 4, 0], "groups": [[0, 1], [2, 2]]},
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_ranks_are_set_as_given(case, model):
    """Numbers, lists, NumPy's arrays and JAX's, one rank per example too."""
    given, expected = GIVEN[case]
    set_ranks(model, given)
    assert get_ranks(model) == expected and max_ranks(model) == FULL
    for path, factors in find_factors(model).items():
        stack = np.ndim(FULL[path])
        assert factors.per_example == (np.ndim(expected[path]) > stack)


WRONG = {
    "array": {"first": jnp.int32(99), "groups": jnp.array([3, 0])},
    "numpy": {"first": np.int64(5), "groups": np.array([0, -1])},
    "per example": {"first": jnp.array([0, 5]), "groups": np.full((2, 3), 3)},
    "float": {"first": jnp.float32(1), "groups": np.array([0.5, 1])},
    "shape": {"first": jnp.ones((2, 2), jnp.int32), "groups": np.ones(3, int)},
    "unknown": {"body": 1, "first": 9, "groups": 9},
}


@pytest.mark.parametrize("case", WRONG)
def test_concrete_arrays_are_checked(case, model):
    """(bug 13) By name and all at once; nothing changes."""
    with pytest.raises(UserError) as error:
        set_ranks(model, WRONG[case])
    for path in WRONG[case]:
        assert path in str(error.value)
    assert get_ranks(model) == FULL


def test_masked_ranks_may_be_raised_to_what_is_allocated(model):
    set_ranks(model, {"first": 1, "groups": 0})
    assert rank_limits(model)["first"] == (1, 4, True)
    set_ranks(model, FULL)
    assert get_ranks(model) == FULL


def test_limits_of_ranks_per_example_are_the_highest(model):
    set_ranks(
        model, {"first": jnp.array([1, 3]), "groups": jnp.array([[0, 1], [2, 0]])}
    )
    limits = rank_limits(model)
    assert limits["first"].active == 3 and limits["groups"].active == [1, 2]


def test_a_block_leaves_no_rank_behind(model):
    """(bug 13) Plain, traced in `nnx.jit`, and when the block raises."""
    set_ranks(model, {"first": 3})
    before = get_ranks(model)

    @nnx.jit
    def run(model, rank, inputs):
        with at_ranks(model, {"first": rank}):
            return model(inputs)

    inputs = jnp.ones((2, 4))
    found = run(model, jnp.int32(1), inputs)
    assert get_ranks(model) == before
    with at_ranks(model, {"first": 1}):
        np.testing.assert_allclose(model(inputs), found, rtol=1e-6)
    with pytest.raises(KeyError), at_ranks(model, {"first": jnp.array([1, 2])}):
        raise KeyError
    assert get_ranks(model) == before and not find_factors(model)["first"].per_example


def test_a_shape_that_traced_ranks_cannot_have_is_named(model):
    """Their values are not checked, their shape is."""

    @jax.jit
    def step(rank):
        set_ranks(nnx.clone(model), {"groups": rank})

    with pytest.raises(UserError, match="groups: rank: .*got shape"):
        step(jnp.ones(3, jnp.int32))


def test_traced_ranks_must_be_whole_numbers(model):
    """A float would be cut off in silence, as 2.7 to 2."""

    @jax.jit
    def step(rank):
        set_ranks(nnx.clone(model), {"groups": rank})

    with pytest.raises(UserError, match="groups: rank: must be whole numbers, got flo"):
        step(jnp.full(2, 2.7))
    step(jnp.full(2, 2, jnp.uint8))
