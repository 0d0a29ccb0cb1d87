"""Sharded equals unsharded: over examples, and over the rank axis itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import relative_error

from lowrank_jax import factorize, find_factors, set_ranks

MESH = (4, 2)


class Net(nnx.Module):
    """A convolution and a linear layer, so that both kinds of product are there."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean(axis=(1, 2)))


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("over_ranks", [False, True])
def test_gradient_is_the_same_sharded(rank: int, over_ranks: bool):
    """Loss and gradient over 8 devices equal those on one, whatever is sharded."""
    mesh = jax.make_mesh(MESH, ("data", "rank"), axis_types=(AxisType.Auto,) * 2)
    model = factorize(Net(nnx.Rngs(0)))
    set_ranks(model, {path: rank for path in find_factors(model)})
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)

    @jax.jit
    def loss_and_gradient(params, images):
        def loss(params):
            return jnp.mean(nnx.merge(graphdef, params, rest, copy=True)(images) ** 2)

        return jax.value_and_grad(loss)(params)

    def place(key_path, leaf):
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        axes = [None] * leaf.ndim
        if over_ranks and key.split("/")[-2:-1] == ["factors"]:
            axes[-1 if key.endswith("u") else -2] = "rank"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    pure = nnx.as_pure(params)
    expected = loss_and_gradient(pure, images)
    batch = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    sharded = jax.tree.map_with_path(place, pure)
    found = loss_and_gradient(sharded, batch)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert relative_error(np.asarray(a), np.asarray(b)) <= 1e-5
    used = jax.tree.leaves(sharded)[0].sharding.device_set
    assert len(used) == 8
