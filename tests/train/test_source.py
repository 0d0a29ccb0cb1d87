"""A checkpoint opened to be cut: what its curves are, and what reading them takes."""

import jax
import numpy as np
import pytest

from benchmarks import truncation
from lowrank_jax import checkpoint, paths
from lowrank_jax.selection import curves
from train.source import Source

CURVES = {
    "importances": curves.column_importances,
    "spectra": curves.singular_values,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Sixteen layers, far larger than what else is in memory."""
    path = tmp_path_factory.mktemp("large") / "model"
    truncation.write(path, 1e6)
    return path


def open_source(path) -> Source:
    return Source(checkpoint.open_checkpoint(path).path, None, [])


def layer_bytes(source: Source) -> int:
    factors = paths.find_factors(source.whole)["head"]
    return 4 * (factors.u.size + factors.v.size)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("which", ["run", "large"])
def test_curves_are_those_of_the_whole_model(which, name, request):
    """Bit for bit, though no two layers are read together; they are read once."""
    source = open_source(request.getfixturevalue(which))
    found = getattr(source.context(), name)()
    assert "whole" not in vars(source)
    expected = CURVES[name](paths.find_factors(source.whole))
    assert found.keys() == expected.keys() == source.ranks.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], strict=True)
    assert getattr(source.context(), name)() is found


def test_one_layer_is_in_memory_at_a_time(large):
    """By what JAX holds when each curve is asked for; the whole model, the control, is
    sixteen."""

    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    source, layers = open_source(large), []
    before = held()

    def curve(factors):
        layers.append(held() - before)
        return dict.fromkeys(factors, np.zeros(1))

    assert source.layer_by_layer(curve).keys() == source.ranks.keys()
    after = held() - before
    one = layer_bytes(source)
    assert len(layers) == truncation.LAYERS
    assert all(one <= size < 1.01 * one for size in layers) and after < 0.01 * one
    assert held() - before > truncation.LAYERS * one
