"""Models of layers with more than two factors (LoRITa), and scales in convolutions.

Every expected value is a chain of matrices, or a convolution pixel by pixel, in NumPy
float64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import draw, product
from flax import nnx
from reference import convolve, relative_error

from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, set_ranks
from lowrank_jax.factorization import factorize
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import canonicalize, merge, truncate


class Net(nnx.Module):
    """Convolutions (by scheme 0, by scheme 2, in groups), and layers of both shapes."""

    def __init__(self, rngs: nnx.Rngs):
        def init(key, shape, dtype):
            return draw(*shape) / 2

        conv = functools.partial(nnx.Conv, kernel_init=init, bias_init=init, rngs=rngs)
        linear = functools.partial(
            nnx.Linear, kernel_init=init, bias_init=init, rngs=rngs
        )
        self.channel = conv(2, 4, (3, 2), strides=2, padding=1)
        self.spatial = conv(4, 4, (2, 3), strides=(1, 2), padding="VALID")
        self.grouped = conv(4, 6, (2, 2), feature_group_count=2, padding="VALID")
        self.tall = linear(6, 4)
        self.wide = linear(4, 7)

    def __call__(self, images):
        hidden = self.grouped(jnp.tanh(self.spatial(jnp.tanh(self.channel(images)))))
        return self.wide(jnp.tanh(self.tall(jnp.tanh(hidden))))


RULES = [("spatial", {"depth": 4, "scheme": 2}), (".*", {"depth": 3})]
FULL = {"channel": 4, "grouped": [3, 3], "spatial": 8, "tall": 4, "wide": 4}
MIXED = {"channel": 2, "grouped": [3, 1], "spatial": 5, "tall": 3, "wide": 1}
PROFILES = [
    *({p: min(r, n) if p != "grouped" else [min(3, n)] * 2 for p, r in FULL.items()}
      for n in (*range(5), 6)),
    MIXED,
    FULL,
]  # fmt: skip


def images(batch: int) -> jax.Array:
    return draw(batch, 7, 8, 2, seed=5)


@functools.cache
def parts() -> tuple[Any, Any]:
    return nnx.split(factorize(Net(nnx.Rngs(0)), RULES))


def deep_net(*, trained: bool = True) -> nnx.Module:
    """The factorized net; "trained" moves the squares away from diagonal ones."""
    model = nnx.merge(*parts(), copy=True)
    for number, factors in enumerate(find_factors(model).values()):
        noise = draw(*factors.middle.shape, seed=number) / 3
        factors.middle.set_value(factors.middle[...] + noise * trained)
    return model


def conv_kernel(matrix: np.ndarray, shape: tuple[int, ...], scheme: int) -> np.ndarray:
    """A kernel (k1, k2, c, f) from its matrix, or matrices of groups, by hand."""
    k1, k2, c, f = shape
    if scheme == 2:
        return matrix.reshape(k1, c, k2, f).transpose(0, 2, 1, 3)
    groups = matrix.reshape(-1, k1, k2, c, matrix.shape[-1])
    return groups.transpose(1, 2, 3, 0, 4).reshape(shape)


def numpy_net(model: nnx.Module, inputs: Any, ranks: dict[str, Any]) -> np.ndarray:
    """The net on chains of leading parts, in float64."""
    matrices = {p: product(one, ranks[p]) for p, one in find_factors(model).items()}
    hidden = np.float64(inputs)
    convs = {  # kernel, scheme, strides, padding, groups
        "channel": ((3, 2, 2, 4), 0, (2, 2), ((1, 1), (1, 1)), 1),
        "spatial": ((2, 3, 4, 4), 2, (1, 2), ((0, 0), (0, 0)), 1),
        "grouped": ((2, 2, 2, 6), 0, (1, 1), ((0, 0), (0, 0)), 2),
    }
    for path, (shape, scheme, strides, padding, groups) in convs.items():
        kernel = conv_kernel(matrices[path], shape, scheme)
        hidden = convolve(
            hidden, kernel, strides=strides, padding=padding, groups=groups
        )
        hidden = np.tanh(hidden + np.float64(getattr(model, path).bias[...]))
    hidden = np.tanh(hidden @ matrices["tall"] + np.float64(model.tall.bias[...]))
    return hidden @ matrices["wide"] + np.float64(model.wide.bias[...])


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, inputs):
    return nnx.merge(graph, state)(inputs)


def outputs_of(model: nnx.Module, inputs: jax.Array) -> jax.Array:
    graph, state = nnx.split(model)
    return run(graph, nnx.as_pure(state), inputs)


def test_a_deep_model_is_its_dense_twin():
    """At full depth and rank, in function and merged back."""
    model, dense = deep_net(trained=False), Net(nnx.Rngs(0))
    assert get_ranks(model) == FULL
    depths = {path: one.depth for path, one in find_factors(model).items()}
    assert depths == {**dict.fromkeys(FULL, 3), "spatial": 4}
    expected = outputs_of(dense, images(2))
    assert relative_error(outputs_of(model, images(2)), expected) <= 1e-5
    back = merge(model)
    assert nnx.graphdef(back) == nnx.graphdef(dense)
    assert relative_error(outputs_of(back, images(2)), expected) <= 1e-5


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("ranks", PROFILES, ids=lambda r: f"spatial {r['spatial']}")
def test_masked_is_truncated_is_merged_is_numpy(ranks, batch):
    """At every rank down to 0, for few inputs (one factor after the other) and many."""
    model, inputs = deep_net(), images(batch)
    small = truncate(model, ranks)
    set_ranks(model, ranks)
    expected = numpy_net(model, inputs, ranks)
    assert relative_error(outputs_of(model, inputs), expected) <= 1e-5
    assert relative_error(outputs_of(small, inputs), expected) <= 1e-5
    assert relative_error(outputs_of(merge(small), inputs), expected) <= 1e-5


def test_a_canonical_deep_model_keeps_its_function():
    """Of the masked model; and it is deep no more."""
    model = deep_net()
    set_ranks(model, MIXED)
    canonical = canonicalize(model)
    assert {one.depth for one in find_factors(canonical).values()} == {2}
    assert {one.depth for one in find_factors(model).values()} == {3, 4}
    found, expected = outputs_of(canonical, images(2)), outputs_of(model, images(2))
    assert relative_error(found, expected) <= 1e-5


def test_a_deep_checkpoint_comes_back_bit_for_bit(tmp_path):
    """Onto a structure made by the rules it carries; at lower ranks it is truncated."""
    model = deep_net()
    set_ranks(model, MIXED)
    checkpoint.save(tmp_path / "deep", model)
    saved = checkpoint.open_checkpoint(tmp_path / "deep")
    structure = nnx.eval_shape(
        lambda: factorize(Net(nnx.Rngs(1)), saved.metadata["rank_rules"])
    )
    found = checkpoint.load(saved, structure)
    assert nnx.graphdef(found) == nnx.graphdef(model) and get_ranks(found) == MIXED
    np.testing.assert_array_equal(
        outputs_of(found, images(2)), outputs_of(model, images(2))
    )
    lower = {**MIXED, "tall": 0, "grouped": [2, 1]}
    small = checkpoint.load(saved, structure, ranks=lower)
    expected = truncate(model, lower)
    assert nnx.graphdef(small) == nnx.graphdef(expected)
    states = (jax.tree.leaves(nnx.state(x, nnx.Param)) for x in (small, expected))
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(
        outputs_of(small, images(2)), outputs_of(expected, images(2))
    )


SAME = {1: ((1, 1), (0, 1)), 2: ((1, 1), (0, 0))}
"""By stride: what a kernel 3 x 2 adds to an image 7 x 6 before and after each axis."""


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scheme", [0, 2], ids=["channel-wise", "spatial-wise"])
def test_scaled_factors_are_one_convolution(scheme, stride, padding):
    """SVD training (Yang et al., 2020): U diag(|s|) V^T is the recomposed kernel, for
    scales of both signs, at every rank, by one convolution after the other or merged.
    """
    rule = [(".*", {"with_s": True, "scheme": scheme})]
    conv = functools.partial(nnx.Conv, rngs=nnx.Rngs(0))
    layer = conv(3, 4, (3, 2), strides=stride, padding=padding, use_bias=False)
    layer = factorize(layer, rule)
    factors = layer.factors
    factors.s.set_value(draw(factors.max_rank, seed=1))
    assert np.ptp(np.sign(factors.s[...])) == 2
    u, s, v = (np.asarray(x[...], float) for x in (factors.u, factors.s, factors.v))
    around = SAME[stride] if padding == "SAME" else ((0, 0), (0, 0))
    for rank in (0, 1, 3, factors.max_rank):
        factors.set_rank(rank)
        matrix = (u[:, :rank] * np.abs(s[:rank])) @ v[:rank]
        kernel = conv_kernel(matrix, (3, 2, 3, 4), scheme)
        assert relative_error(layer.merged_kernel(), kernel) <= 1e-6
        for batch in (1, 8):
            inputs = draw(batch, 7, 6, 3, seed=2)
            expected = convolve(
                inputs, kernel, strides=(stride, stride), padding=around
            )
            assert relative_error(layer(inputs), expected) <= 1e-5
