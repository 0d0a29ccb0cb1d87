"""Small models that tests of checkpoints save, their ranks, how to compare them."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.factorization import factorize


class Net(nnx.Module):
    """A grouped convolution, batch normalization, tied layers, and one in bfloat16."""

    def __init__(self, rngs: nnx.Rngs, width: int = 8, dtype: Any = jnp.bfloat16):
        self.conv = nnx.Conv(4, 6, (2,), feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.tied = nnx.Linear(width, width, rngs=rngs)
        self.again = self.tied
        self.half = nnx.Linear(width, 5, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, inputs):
        hidden = self.norm(self.conv(inputs), use_running_average=True)
        hidden = self.again(self.tied(jnp.tanh(self.first(hidden))))
        return self.half(self.dropout(hidden))


class Scanned(nnx.Module):
    """Linear layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = build(rngs)

    def __call__(self, inputs):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, inputs):
            return jnp.tanh(layer(inputs))

        return run(self.layers, inputs)


INPUTS = jnp.sin(jnp.arange(40.0)).reshape(2, 5, 4)
FULL = {"again": 8, "conv": [3, 3], "first": 6, "half": 5}
LOWER = {"again": 3, "conv": [0, 2], "first": 0, "half": 2}
ACTIVE = {"again": 4, "conv": [1, 3]}


@functools.cache
def parts(kind: type[nnx.Module], with_s: bool):
    model = factorize(kind(nnx.Rngs(0)), [(".*", {"with_s": with_s})])
    if kind is Net:
        model.norm.mean.set_value(model.norm.mean[...] + 0.3)
    return nnx.split(model)


def low_rank(kind: type[nnx.Module] = Net, with_s: bool = False) -> nnx.Module:
    return nnx.merge(*parts(kind, with_s), copy=True)


def structure(kind: type[nnx.Module] = Net, with_s: bool = False, **options) -> Any:
    """The model without numbers, from other random keys."""
    return nnx.eval_shape(
        lambda: factorize(kind(nnx.Rngs(7), **options), [(".*", {"with_s": with_s})])
    )


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def assert_same(model: nnx.Module, other: nnx.Module) -> None:
    """All numbers but random keys, dtypes included, the ranks, and the structure."""
    found, expected = arrays(model), arrays(other)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], path, strict=True)
    assert get_ranks(model) == get_ranks(other) and max_ranks(model) == max_ranks(other)
    assert nnx.graphdef(model) == nnx.graphdef(other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A masked model, saved once for the tests that only read."""
    model = low_rank()
    set_ranks(model, ACTIVE)
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(path, model, step=5)
    return path
