"""The normalization that follows convolutions, and the check of its options.

On CPUs XLA (jax 0.10.2) sums over all axes but the last one slowly, the more so what it
fuses into the sum: BatchNorm, forward and backward, takes 35 ms for 32 x 32 x 32 x 64
numbers. Here such sums are products with ones, which take 8 ms in all. They are the
same functions, to rounding; on other devices they are Flax's own.

Letters: `g` rows that are summed apart, `n` rows summed, `c` channels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.sizes import MOST_FEATURES

NORMS = ("batch", "group")


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` of the last axis, whose sums are products on CPUs."""

    def __call__(
        self,
        x: Float[Array, "*b c"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "*b c"]:
        """Returns the normalized inputs; keeps their statistics as Flax does."""
        average = use_running_average
        average = self.use_running_average if average is None else average
        if average or self.axis != -1 or not _sums_by_products(self, x, mask):
            return super().__call__(x, use_running_average, mask=mask)
        rows = x.reshape(1, -1, x.shape[-1])
        mean = total(rows) / rows.shape[1]
        outputs, var = _normalized(self, rows, mean, total(rows**2) / rows.shape[1])
        for kept, new in ((self.mean, mean[0]), (self.var, var[0])):
            new = jax.lax.stop_gradient(new)
            kept[...] = self.momentum * kept[...] + (1 - self.momentum) * new
        return outputs.reshape(x.shape)


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm`, whose sums are products on CPUs."""

    def __call__(
        self, x: Float[Array, "b *n c"], *, mask: Array | None = None
    ) -> Float[Array, "b *n c"]:
        """Returns the normalized inputs."""
        if self.reduction_axes is not None or not _sums_by_products(self, x, mask):
            return super().__call__(x, mask=mask)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        mean, square = (self._group_mean(y) for y in (rows, rows**2))
        return _normalized(self, rows, mean, square)[0].reshape(x.shape)

    def _group_mean(self, rows: Float[Array, "g n c"]) -> Float[Array, "g c"]:
        """The mean of each group, for each of its channels."""
        groups = total(rows).reshape(len(rows), self.num_groups, self.group_size)
        means = groups.mean(axis=-1) / rows.shape[1]
        return jnp.repeat(means, self.group_size, axis=1)


def _sums_by_products(
    norm: nnx.BatchNorm | nnx.GroupNorm, x: Array, mask: Array | None
) -> bool:
    """Whether this is a CPU, and nothing is asked for but what models here need."""
    if jax.default_backend() != "cpu" or not norm.use_fast_variance:
        return False
    if any(a is not None for a in (mask, norm.axis_name, norm.axis_index_groups)):
        return False
    if norm.scale is None or norm.bias is None:
        return False
    dtypes = {x.dtype, norm.scale.dtype, jnp.dtype(norm.dtype or x.dtype)}
    return dtypes == {jnp.dtype("float32")}


def _normalized(
    norm: nnx.BatchNorm | nnx.GroupNorm,
    rows: Float[Array, "g n c"],
    mean: Float[Array, "g c"],
    square: Float[Array, "g c"],
) -> tuple[Float[Array, "g n c"], Float[Array, "g c"]]:
    """The normalized rows, and their variance, from their mean and mean square."""
    var = jnp.maximum(0, square - mean**2)
    scale = jax.lax.rsqrt(var + norm.epsilon) * norm.scale[...][None]
    return scale_rows(rows, scale, norm.bias[...][None] - mean * scale), var


@jax.custom_vjp
def total(rows: Float[Array, "g n c"]) -> Float[Array, "g c"]:
    """Returns the sums of rows, as a product with ones."""
    ones = jnp.ones((len(rows), 1, rows.shape[1]), rows.dtype)
    return jnp.matmul(ones, rows)[:, 0]


total.defvjp(
    lambda rows: (total(rows), rows.shape),
    lambda shape, cotangent: (jnp.broadcast_to(cotangent[:, None], shape),),
)


@jax.custom_vjp
def scale_rows(
    rows: Float[Array, "g n c"],
    scale: Float[Array, "g c"],
    shift: Float[Array, "g c"],
) -> Float[Array, "g n c"]:
    """Returns `rows * scale + shift`; the gradients' sums are products with ones."""
    return rows * scale[:, None] + shift[:, None]


def _scale_rows_backward(saved: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    rows, scale = saved
    return cotangent * scale[:, None], total(cotangent * rows), total(cotangent)


scale_rows.defvjp(
    lambda rows, scale, shift: (scale_rows(rows, scale, shift), (rows, scale)),
    _scale_rows_backward,
)


def make_norm(
    features: int, *, norm: str, groups: int, rngs: nnx.Rngs
) -> nnx.BatchNorm | nnx.GroupNorm:
    """Makes batch normalization, or group normalization of at most so many groups."""
    if norm == "batch":
        return BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
    groups = min(groups, features)
    return GroupNorm(features, num_groups=groups, epsilon=1e-5, rngs=rngs)


def problems(
    model: str, norm: str, groups: int, widths: Sequence[float], multiplier: float
) -> list[str]:
    """Lists what is wrong with these options of a model."""
    errors = []
    if norm not in NORMS:
        errors.append(
            f"{model}: norm must be one of {NORMS}, got {norm!r}. Choose one of them."
        )
    if not all(1 <= width <= MOST_FEATURES and width == int(width) for width in widths):
        errors.append(
            f"{model}: width_multiplier must give whole widths in "
            f"[1, {MOST_FEATURES:,}], got "
            f"{multiplier}, hence {sorted(set(widths))}. Choose another multiplier."
        )
    elif norm == "group" and (
        groups < 1 or any(width % min(groups, width) for width in widths)
    ):
        errors.append(
            f"{model}: groups must be at least 1 and divide every width above it, got "
            f"{groups} for the widths {sorted(set(widths))}. Choose another number."
        )
    return errors
