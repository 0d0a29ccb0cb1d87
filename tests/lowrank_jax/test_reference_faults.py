"""Faults of the reference code of Maestro, each a test that ours does not have it.

Read in the authors' PyTorch code: ranks are not in its checkpoints; a convolution of
rank 0 returns a wrong shape; the gradient of the lasso is NaN at zero; ranks are
rounded in floating point; folding back to dense ignores the mask; the sampler can be
neither seeded nor resumed. `test_reference_faults_training.py` has those of training.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_mlp
from flax import nnx
from reference import relative_error
from small_mlp import FULL_RANKS, batch, make_draw

from lowrank_jax import checkpoint, factorization, penalties, samplers, surgery
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankConv, LowRankLinear
from lowrank_jax.ranks import at_fraction, fraction_of

small_model = small_mlp.small_model


# Ranks are not in its checkpoints.


def test_ranks_are_in_the_checkpoint(small_model, tmp_path):
    """Allocated and active ranks come back, outputs bit for bit; lower ranks too."""
    model = surgery.truncate(small_model, {"hidden/0": 4})
    set_ranks(model, {"hidden/0": 2, "head": 1})
    checkpoint.save(tmp_path / "saved", model)
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    assert saved.metadata["max_ranks"] == {"head": 3, "hidden/0": 4}
    assert saved.metadata["ranks"] == {"head": 1, "hidden/0": 2}

    images = batch(0)["image"]
    loaded = checkpoint.load(saved, small_model)
    assert get_ranks(loaded) == {"head": 1, "hidden/0": 2}
    np.testing.assert_array_equal(loaded(images), model(images))
    lower = checkpoint.load(saved, small_model, ranks={"hidden/0": 1, "head": 1})
    expected = surgery.truncate(model, {"hidden/0": 1, "head": 1})
    np.testing.assert_array_equal(lower(images), expected(images))
    with pytest.raises(UserError, match=r"hidden/0: rank must be in \[0, 2\], got 3"):
        checkpoint.load(saved, small_model, ranks={"hidden/0": 3})


# A convolution of rank 0 returns a wrong shape.


@pytest.mark.parametrize(
    ("strides", "padding", "scheme"), [(1, "SAME", 0), (2, "VALID", 2), (2, 1, 0)]
)
def test_a_convolution_of_rank_zero_is_its_bias(strides, padding, scheme):
    """Its shape is the dense one's and its value the bias; the bias still learns.

    However the rank became 0: by the mask, by truncation or at the start.
    """
    ones = nnx.initializers.ones
    options = {"padding": padding, "kernel_init": ones, "rngs": nnx.Rngs(0)}
    dense = nnx.Conv(3, 4, (3, 3), strides, **options)
    dense.bias.set_value(jnp.arange(1.0, 5.0))
    full = LowRankConv.from_dense(dense, scheme=scheme)
    masked = nnx.clone(full)
    masked.factors.set_rank(0)
    cut = surgery.truncate(full, {"": 0})
    born = LowRankConv.from_dense(dense, max_rank=0, scheme=scheme)
    images = jnp.ones((2, 7, 7, 3))
    shape = nnx.eval_shape(lambda dense: dense(images), dense).shape
    expected = np.broadcast_to(np.arange(1.0, 5.0), shape)
    for layer in (masked, cut, born):
        np.testing.assert_array_equal(layer(images), expected)
        grads = nnx.grad(lambda layer: jnp.sum(layer(images)))(layer)
        np.testing.assert_array_equal(grads["bias"][...], expected[..., 0].size)
        np.testing.assert_array_equal(surgery.merge(layer).kernel[...], 0)


# The gradient of the lasso is NaN at zero.


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("live", [0, 2, 5])
@pytest.mark.parametrize("name", ["group_lasso", "hierarchical_group_lasso"])
def test_the_gradient_of_the_lasso_is_finite_at_zero(name, live, with_s):
    """Zero on columns that are zero, and unchanged by them on columns that are not."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(6, 5)), rng.normal(size=(5, 4))
    u[:, live:], v[live:] = 0, 0
    penalty = penalties.PENALTIES[name](weight=1.0)

    def gradient(columns: int) -> nnx.State:
        s = jnp.ones(columns) if with_s else None
        arrays = jnp.float32(u[:, :columns]), jnp.float32(v[:columns])
        return nnx.grad(lambda factors: penalty(factors, 0))(Factors(*arrays, s))

    padded, alone = gradient(5), gradient(live)
    for part, axis in (("u", -1), ("v", 0)):
        array = np.moveaxis(np.asarray(padded[part][...]), axis, 0)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array[live:], 0)
        reference = np.moveaxis(np.asarray(alone[part][...]), axis, 0)
        np.testing.assert_allclose(array[:live], reference, rtol=1e-6)


# Ranks are rounded in floating point.


def test_fractions_of_a_rank_are_exact():
    """`rank / width` of a width is that rank, for all 131,328 pairs up to width 512.

    The control, `ceil` in floats, is wrong for 4,122 of them (75,010 up to width
    2,048), the first at width 25, rank 7.
    """
    pairs = [(width, rank) for width in range(1, 513) for rank in range(1, width + 1)]
    wrong = [(w, r) for w, r in pairs if math.ceil(r / w * w) != r]
    assert len(wrong) == 4122 and wrong[0] == (25, 7)
    assert [(w, r) for w, r in pairs if fraction_of(r / w, w) != r] == []


def test_every_user_of_a_fraction_rounds_exactly():
    """7/25 of rank 25 is 7 in evaluation, in samplers and in rules."""
    limits = {"a": 25, "stack": [25, 50]}
    expected = {"a": 7, "stack": [7, 14]}
    assert at_fraction(limits, 7 / 25) == expected
    for sampler in (
        samplers.matryoshka(fractions=[1.0, 7 / 25]),
        samplers.sandwich(passes=2, smallest=7 / 25),
        samplers.uniform_fraction(fractions=[1.0, 7 / 25]),
    ):
        tables = sampler.init(limits).tables
        assert {path: table[1].tolist() for path, table in tables.items()} == expected
    rules = [(".*", {"rank_fraction": 7 / 25})]
    low_rank = nnx.eval_shape(
        lambda: factorization.factorize(nnx.Linear(25, 30, rngs=nnx.Rngs(0)), rules)
    )
    assert max_ranks(low_rank) == {"": 7}


# Folding back to dense ignores the mask.


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_merging_respects_the_mask(kind):
    """The dense twin of a masked layer is that layer, not the one at full rank."""
    if kind == "linear":
        layer = LowRankLinear(6, 5, rngs=nnx.Rngs(0))
        inputs = batch(0)["image"].reshape(-1, 16)[:, :6]
    else:
        layer = LowRankConv(1, 5, (3, 3), rngs=nnx.Rngs(0))
        inputs = batch(0)["image"]
    at_full = layer(inputs)
    set_ranks(layer, {"": 2})
    dense = surgery.merge(layer)
    assert type(dense) is type(layer).dense_type
    assert relative_error(dense(inputs), layer(inputs)) <= 1e-5
    assert relative_error(dense(inputs), at_full) >= 1e-2
    kernel = np.asarray(dense.kernel[...]).reshape(-1, 5)
    assert np.linalg.matrix_rank(kernel, tol=1e-5) == 2


# The sampler can be neither seeded nor resumed.


SAMPLERS = {  # one of each kind of state
    "independent": {},
    "sandwich": {"passes": 4, "smallest": 0.125},
    "single_layer": {},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_seeded_and_goes_on_where_it_stopped(name, small_model, tmp_path):
    """The same key, the same ranks; another key, others; a checkpoint continues them.

    A pass of `single_layer` is 9 pairs long here: after 13 steps it is under way.
    """
    sampler = samplers.SAMPLERS[name](**SAMPLERS[name])
    draw, fresh = make_draw(sampler, 13), sampler.init(FULL_RANKS)
    first, state = draw(fresh, 1, 0)
    same, other = draw(fresh, 1, 0)[0], draw(fresh, 2, 0)[0]
    assert all(np.array_equal(first[path], same[path]) for path in FULL_RANKS)
    assert any(not np.array_equal(first[path], other[path]) for path in FULL_RANKS)

    checkpoint.save(tmp_path / "saved", small_model, items={"sampler": state})
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    restored = checkpoint.restore(saved, {"sampler": fresh})["sampler"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    going_on, resumed = draw(state, 1, 13)[0], draw(restored, 1, 13)[0]
    for path in FULL_RANKS:
        np.testing.assert_array_equal(going_on[path], resumed[path])
