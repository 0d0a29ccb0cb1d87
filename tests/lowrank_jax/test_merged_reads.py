"""Merged kernels: foreign code reads them as it reads a dense `nnx.Param`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_models import Attention

from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.layers import LowRankLinear
from lowrank_jax.surgery import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*value' access:DeprecationWarning"),
    pytest.mark.usefixtures("registered"),
]


def test_a_kernel_is_read_at_the_active_rank_and_differentiably():
    """Under jit and grad, as what foreign code multiplies by."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(2)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        layer = nnx.merge(graph, params, rest)
        assert layer.kernel.shape == (5, 4)
        return jnp.sum(jnp.ones((3, 5)) @ layer.kernel)

    grads = nnx.to_pure_dict(gradient(params))["factors"]
    np.testing.assert_array_equal(grads["u"][:, 2:], 0)
    assert np.all(np.any(grads["u"][:, :2], axis=0))
    assert np.linalg.matrix_rank(np.asarray(layer.kernel)) == 2


READS: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda kernel: jnp.matmul(jnp.ones((2, 5)), kernel),
    "dot": lambda kernel: jnp.dot(jnp.ones((2, 5)), kernel),
    "einsum": lambda kernel: jnp.einsum("bi,io->bo", jnp.ones((2, 5)), kernel),
    "sum": jnp.sum,
    "take": lambda kernel: jnp.take(kernel, jnp.array([1, 3]), axis=0),
    "stack": lambda kernel: jnp.stack([kernel, kernel]),
    "asarray": jnp.asarray,
    "astype": lambda kernel: kernel.astype(jnp.bfloat16),
    "jit": jax.jit(lambda kernel: 2 * kernel + kernel[...]),
    "closure": lambda kernel: jax.jit(lambda x: jnp.dot(x, kernel))(jnp.ones((2, 5))),
    "vmap": jax.vmap(lambda row: row * 2),
    "scan": lambda kernel: jax.lax.scan(lambda c, row: (c, row * 1), 0, kernel)[1],
    "tree": lambda kernel: jax.tree.leaves(kernel)[0],
    "penalty": lambda kernel: sum(jnp.sum(x**2) for x in jax.tree.leaves(kernel)),
    "raw value": lambda kernel: kernel.get_raw_value(),
    "metadata": lambda kernel: jnp.asarray(len(kernel.get_metadata())),
    "sharding": lambda kernel: jnp.asarray(kernel.sharding_names is None),
}


@pytest.mark.filterwarnings("ignore:.*sharding_names:DeprecationWarning")
@pytest.mark.parametrize("case", READS)
def test_what_takes_a_param_takes_a_merged_kernel(case):
    """The same numbers from a dense Param and from the merged one, and gradients."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(2)
    read, dense = READS[case], merge(layer)
    expected = read(dense.kernel)
    found = read(layer.kernel)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=1e-6
    )
    if case not in ("metadata", "sharding"):
        loss = nnx.grad(lambda m: jnp.sum(jnp.float32(read(m.kernel)) ** 2))
        assert np.any(loss(layer)["factors"]["u"][...])
    assert "kernel" not in nnx.to_pure_dict(nnx.state(layer))


def test_reads_of_an_abstract_model_have_shapes():
    model = nnx.eval_shape(lambda: factorize(Attention(nnx.Rngs(0))))
    assert model.query.kernel.shape == model.query.kernel[...].shape == (4, 2, 3)


def test_shapes_are_known_at_a_rank_per_example():
    """Foreign code may check shapes while a sampler draws a rank for each example."""
    layer = LowRankLinear(5, 4, rngs=nnx.Rngs(0))
    layer.factors.set_rank(np.array([1, 2, 3]))
    assert layer.kernel.shape == (5, 4)
    for read in (lambda kernel: kernel[...], jnp.sum):
        with pytest.raises(UserError, match="must be one number to merge"):
            read(layer.kernel)
