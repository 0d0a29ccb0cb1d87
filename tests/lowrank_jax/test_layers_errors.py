"""What low-rank layers refuse: wrong ranks, factors, schemes, equations, masks."""

import jax.numpy as jnp
import pytest
from flax import nnx
from layer_rows import ROWS, factorized

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import (
    LowRankConv,
    LowRankConvTranspose,
    LowRankEinsum,
    LowRankLinear,
)


@pytest.mark.parametrize("max_rank", [-1, 4])
def test_a_rank_that_the_matrix_has_not_is_an_error(max_rank):
    with pytest.raises(ValueError, match=rf"must be in \[0, 3\], got {max_rank}\."):
        LowRankLinear(4, 3, max_rank=max_rank, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", [LowRankConv, LowRankConvTranspose])
def test_a_masked_convolution_is_an_error(kind):
    mask = jnp.ones((3, 2, 3))
    with pytest.raises(ValueError, match="masked kernel is not a product of low rank"):
        kind(2, 3, (3,), mask=mask, rngs=nnx.Rngs(0))


def test_factors_that_do_not_fit_the_kernel_are_an_error():
    """Both shapes are named; neither a rank is dropped nor a matrix of another size
    taken."""
    dense = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    wrong = Factors.from_matrix(jnp.ones((9, 7)), 2)
    with pytest.raises(UserError, match=r"shape \(6, 4\) .* got \(9, 7\)"):
        LowRankLinear.from_dense(dense, factors=wrong)
    stacked = Factors.from_matrix(jnp.ones((2, 6, 4)), 2)
    with pytest.raises(UserError, match=r"shape \(6, 4\) .* got \(2, 6, 4\)"):
        LowRankLinear.from_dense(dense, factors=stacked)
    right = Factors.from_matrix(jnp.ones((6, 4)), 4)
    with pytest.raises(UserError, match="not both, got max_rank 2 and factors of ran"):
        LowRankLinear.from_dense(dense, max_rank=2, factors=right)


def test_a_scheme_for_another_number_of_axes_is_an_error():
    with pytest.raises(ValueError, match="must be 0 or 3, or for two spatial axes"):
        LowRankConv(2, 3, (3,), scheme=1, rngs=nnx.Rngs(0))


def test_an_einsum_that_is_no_matrix_is_an_error():
    with pytest.raises(ValueError, match="to be a matrix. Keep this layer dense"):
        LowRankEinsum("bij,ij->bi", (3, 4), rngs=nnx.Rngs(0))


def test_an_equation_in_the_call_is_an_error():
    layer = LowRankEinsum("bi,io->bo", (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="equation is fixed when the layer is made"):
        layer(jnp.ones((2, 3)), "bi,oi->bo")


@pytest.mark.parametrize(
    "name", ["linear", "general, batch axis", "einsum", "embed, attend", "conv, groups"]
)
def test_ranks_for_another_batch_size_are_an_error(name):
    row = ROWS[name]
    layer, inputs = factorized(row), row.inputs()
    examples = inputs.shape[row.batch] + 1
    stack = layer.factors.stack_shape
    layer.factors.set_rank(jnp.ones((*stack, examples), jnp.int32))
    with pytest.raises(ValueError, match=f"got {examples} for a batch of"):
        nnx.eval_shape(lambda x, i: getattr(x, row.call)(i), layer, inputs)


@pytest.mark.parametrize("name", [x for x, row in ROWS.items() if row.batch is None])
def test_ranks_per_example_need_a_batch_axis(name):
    """Even where the first axis happens to be as long as there are ranks."""
    row = ROWS[name]
    layer, inputs = factorized(row), row.inputs()
    for ranks in {inputs.shape[0], layer.factors.max_rank}:
        layer.factors.set_rank(jnp.ones(ranks, jnp.int32))
        with pytest.raises(ValueError, match="one rank per example needs"):
            layer(inputs)


@pytest.mark.parametrize("name", ["linear", "conv, groups", "embed, lookup"])
def test_ranks_per_example_cannot_be_merged(name):
    layer = factorized(ROWS[name])
    stack = layer.factors.stack_shape
    layer.factors.set_rank(jnp.ones((*stack, 2), jnp.int32))
    with pytest.raises(ValueError, match="must be one number to merge the factors"):
        layer.to_dense()
