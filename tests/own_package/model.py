"""A linear map without bias, and a layer of one's own."""

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype


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


class Affine(nnx.Module):
    """`x w^T + bias`, of a weight `(o, i)` as other frameworks store it.

    The page "Add a layer" of CONTRIBUTING.md makes it low-rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: nnx.Initializer,
        bias_init: nnx.Initializer,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        shape = out_features, in_features
        self.weight = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), shape[:1], param_dtype))
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        inputs, weight = promote_dtype((inputs, self.weight[...]), dtype=self.dtype)
        outputs = inputs @ weight.T
        if self.bias is None:
            return outputs
        bias = self.bias[...].astype(outputs.dtype)
        return outputs + bias.reshape(*[1] * (outputs.ndim - 1), -1)


def build(*, in_features: int, out_features: int, rngs: nnx.Rngs) -> LinearMap:
    """Builds a `LinearMap`."""
    return LinearMap(in_features, out_features, rngs=rngs)


def buggy(*, in_features: int, out_features: int, rngs: nnx.Rngs) -> Buggy:
    """Builds a `Buggy`."""
    return Buggy(in_features, out_features, rngs=rngs)
