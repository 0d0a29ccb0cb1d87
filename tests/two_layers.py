"""A linear layer and a convolution in two groups, whole and with masked ranks."""

import functools

import jax.numpy as jnp
from flax import nnx

from lowrank_jax.active import set_ranks
from lowrank_jax.factorization import factorize

RANKS = {"first": 2, "groups": [1, 2]}
"""Below the allocated 6, [3, 3]; of the two groups one stays masked."""


class Net(nnx.Module):
    """A linear layer, and a convolution in two groups."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.groups = nnx.Conv(6, 6, (1,), feature_group_count=2, rngs=rngs)

    def __call__(self, inputs):
        hidden = jnp.tanh(self.first(inputs))
        return self.groups(hidden[:, None])[:, 0]


@functools.cache
def net(with_s: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(factorize(Net(nnx.Rngs(0)), [(".*", {"with_s": with_s})]))


def masked_net() -> nnx.Module:
    model = nnx.merge(*net(), copy=True)
    set_ranks(model, RANKS)
    return model


def pure_params(model: nnx.Module):
    return nnx.as_pure(nnx.state(model, nnx.Param))
