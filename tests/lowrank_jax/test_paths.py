"""Paths: one for each part of a model, whatever its keys and attributes are called."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_aliases, find_factors, find_layers, walk


def linear(seed: int = 0) -> nnx.Linear:
    return nnx.Linear(4, 3, rngs=nnx.Rngs(seed))


class Holder(nnx.Module):
    """Parts under names of the test's choice."""

    def __init__(self, **parts):
        for name, part in parts.items():
            setattr(self, name, nnx.data(part))


COLLISION = {"x/y": linear(), "x": {"y": linear(1)}}


@pytest.mark.parametrize("find", [find_layers, find_factors, factorize])
def test_two_parts_with_one_path_are_refused_by_name(find):
    with pytest.raises(UserError, match="^part/x/y: every part of a model must have a"):
        find(Holder(part=COLLISION))


def test_a_part_with_the_path_of_the_model_is_refused_by_name():
    with pytest.raises(
        UserError, match="^the model itself: every part of a model must"
    ):
        find_layers(nnx.Dict({"": linear()}))


def test_a_colliding_model_is_not_saved(tmp_path):
    """One of its biases would be missing in the checkpoint."""
    with pytest.raises(
        UserError, match="one array's each, got several for .*part/x/y/bias"
    ):
        checkpoint.save(tmp_path / "saved", Holder(part=COLLISION))
    assert not (tmp_path / "saved").exists()


def test_keys_with_a_slash_are_paths_where_nothing_collides():
    model = factorize(Holder(part={"x/y": linear(), "x": {"z": linear(1)}}))
    assert set(find_factors(model)) == {"part/x/y", "part/x/z"}


def test_parts_named_like_ours_are_not_taken_for_ours():
    """Modules called `factors` or ending so, and Params called `u`."""
    own = Holder(u=nnx.Param(jnp.ones(3)), v=nnx.Param(jnp.ones(3)))
    model = Holder(factors=own, myfactors=linear(), factor=Holder(factors=linear(1)))
    low = factorize(model)
    assert set(find_factors(low)) == {"myfactors", "factor/factors"}
    assert set(find_layers(low)) == set(find_factors(low))
    np.testing.assert_array_equal(low.factors.u[...], 1)


def test_factors_outside_of_layers_stand_under_their_holder_or_themselves():
    """As an attribute `factors` they belong to the module; elsewhere to nobody."""
    one, other = (Factors(jnp.ones((3, 2)), jnp.ones((2, 4))) for _ in range(2))
    model = Holder(part=Holder(factors=one), table={"factors": other}, again=one)
    assert find_factors(model) == {"again": one, "table/factors": other}
    assert find_aliases(model) == {"part": "again"}
    assert find_factors(one) == {"": one}


def test_a_cycle_is_walked_once():
    parent, child = Holder(), Holder()
    parent.child, child.parent = child, parent
    assert [path for path, _ in walk(parent)] == ["", "child"]
