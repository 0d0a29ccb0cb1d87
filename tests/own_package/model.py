"""A linear map without bias."""

import jax
from flax import nnx


class LinearMap(nnx.Module):
    """`x W`, of the kernel at `map`."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.map = nnx.Linear(in_features, out_features, use_bias=False, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.map(inputs)


class Buggy(LinearMap):
    """One whose code goes wrong."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        raise ValueError("a bug of this model")


def build(*, in_features: int, out_features: int, rngs: nnx.Rngs) -> LinearMap:
    """Builds a `LinearMap`."""
    return LinearMap(in_features, out_features, rngs=rngs)


def buggy(*, in_features: int, out_features: int, rngs: nnx.Rngs) -> Buggy:
    """Builds a `Buggy`."""
    return Buggy(in_features, out_features, rngs=rngs)
