"""Layers of one's own: subclasses of known ones, and classes that are registered."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from foreign_models import Dense, Named, Scaled

from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize, kernel_matrices
from lowrank_jax.layers import LAYERS, LowRankLinear, low_rank_type, register

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*value' access:DeprecationWarning"),
    pytest.mark.usefixtures("registered"),
]


def test_a_subclass_that_keeps_the_forward_multiplies_by_the_factors():
    """Its own methods stay; one that changes the forward runs its own code."""
    named = low_rank_type(Named).from_dense(Named(6, 3, rngs=nnx.Rngs(0)))
    assert isinstance(named, LowRankLinear | Named) and named.fan() == 6
    assert isinstance(named, LowRankLinear) and isinstance(named, Named)
    assert not issubclass(low_rank_type(Scaled), LowRankLinear)
    made = low_rank_type(Scaled)(6, 3, max_rank=2, rngs=nnx.Rngs(0))
    assert made.factors.max_rank == 2 and type(made.to_dense()) is Scaled
    assert low_rank_type(type(made)) is None and low_rank_type(nnx.LayerNorm) is None


class Base(nnx.Linear):
    """A base of a project's own, whose forward runs and reads more than one name."""

    gain = 2.0

    def scale(self, inputs):
        return self.gain * inputs

    @property
    def power(self):
        return 1

    def __call__(self, inputs):
        return super().__call__(self.scale(inputs)) ** self.power


class Double:
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


BODIES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "new names": ({"__doc__": "Mine.", "fan": lambda self: 3, "size": 3}, False),
    "annotations": ({"__annotations__": {"gain": float}, "__module__": "my"}, False),
    "__init__": (
        {"__init__": lambda self, *a, **k: Base.__init__(self, 6, 3, **k)},
        False,
    ),
    "the same": ({"__call__": Base.__call__}, False),
    "__call__": ({"__call__": lambda self, inputs: inputs}, True),
    "a method": ({"scale": lambda self, inputs: 3 * inputs}, True),
    "a property": ({"power": property(lambda self: 2)}, True),
    "a constant": ({"gain": 3.0}, True),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_a_subclass_changes_of_the_forward(case):
    """All that the base's forward may reach by a name, and nothing else."""
    body, changes = BODIES[case]
    register(Base, type("LowRankBase", (LowRankLinear,), {"dense_type": Base}))
    kind = low_rank_type(type("Sub", (Base,), body))
    assert issubclass(kind, LowRankLinear) is not changes


def test_a_mixin_before_the_base_changes_the_forward():
    mixed = type("Mixed", (Double, nnx.Linear), {})
    assert not issubclass(low_rank_type(mixed), LowRankLinear)
    after = type("After", (nnx.Linear, Double), {})
    assert issubclass(low_rank_type(after), LowRankLinear)


def test_an_own_forward_costs_its_dense_macs_at_every_rank():
    """It runs merged; at rank 0 nothing is left to run."""
    low = factorize(Scaled(6, 4, rngs=nnx.Rngs(0)))
    cost = count(low, jax.ShapeDtypeStruct((1, 6), "float32"))
    assert [cost.macs({"": rank}) for rank in range(5)] == [0, 24, 24, 24, 24]
    assert cost.params({"": 1}) == 6 + 4 + 4 + 1


def test_a_state_of_the_subclass_is_kept():
    """Its own forward runs on the low-rank layer itself, not on a copy."""

    class Counting(nnx.Linear):
        def __init__(self, *args, rngs):
            super().__init__(*args, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, inputs):
            self.calls[...] += 1
            return super().__call__(inputs)

    low = factorize(Counting(4, 3, rngs=nnx.Rngs(0)))
    nnx.jit(lambda model, x: model(x))(low, jnp.ones((2, 4)))
    assert low.calls[...] == 1 and isinstance(low, Counting)


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError])
def test_a_bug_in_a_layer_of_ones_own_keeps_its_traceback(bug):
    """It is no mistake in the rules, of `factorize` nor of what is read dense."""

    class Other(nnx.Linear):
        pass

    class LowRankOther(LowRankLinear):
        @classmethod
        def fold_of(cls, dense):
            raise bug("of the user")

    register(Other, LowRankOther)
    model = Other(4, 3, rngs=nnx.Rngs(0))
    for read in (factorize, kernel_matrices):
        with pytest.raises(bug, match="of the user") as error:
            read(model)
        assert not isinstance(error.value, UserError)


def test_registering_is_checked():
    """Twice, of no module, with axes that are not those of a kernel."""
    with pytest.raises(UserError, match="Dense must not be in the table yet"):
        register(Dense, kernel="weight")
    with pytest.raises(UserError, match="must be given a class of NNX modules"):
        register(dict)

    class Other(nnx.Module):
        pass

    for axes in ({"inputs": (0,), "outputs": (0,)}, {"inputs": (), "outputs": (0,)}):
        with pytest.raises(UserError, match=r"register\(Other\): inputs, outputs and"):
            register(Other, **axes)
    assert Other not in LAYERS


def test_a_class_with_its_own_low_rank_layer_is_one_row():
    """A low-rank type of one's own beside the dense one."""

    class LowRankOther(LowRankLinear):
        pass

    class Other(nnx.Module):
        pass

    assert register(Other, LowRankOther) is LowRankOther
    assert low_rank_type(Other) is LowRankOther


def test_a_twin_with_attributes_named_like_ours_is_refused():
    class Clash(nnx.Linear):
        def __init__(self, *args, rngs):
            super().__init__(*args, rngs=rngs)
            self.factors = 3

    with pytest.raises(UserError, match=r"Clash: \['factors', 'fold'\] are the low"):
        factorize(Clash(4, 3, rngs=nnx.Rngs(0)))
