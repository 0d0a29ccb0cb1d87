"""Layers of one model in forms of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

import lowrank_jax as lr
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import rules_of
from lowrank_jax.surgery import take_forms
from lowrank_jax.times import MERGED


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    keys = nnx.Rngs(0)
    shared = nnx.Linear(9, 9, rngs=keys)
    layers = (nnx.Linear(6, 9, rngs=keys), shared, shared, nnx.Linear(9, 4, rngs=keys))
    full = lr.factorize(nnx.Sequential(*layers))
    return lr.truncate(full, {"layers/0": 3, "layers/1": 4, "layers/3": 2})


def test_each_layer_takes_its_own(model):
    """The function stays, and so does the model that was given; by any path of a layer
    that is shared."""
    forms = {"layers/0": "gauge", "layers/2": MERGED}
    turned = take_forms(model, forms)
    kinds = {path: one.form for path, one in lr.find_factors(turned).items()}
    assert kinds == {"layers/0": "gauge", "layers/3": "factored"}
    assert turned.layers[1] is turned.layers[2]
    assert type(turned.layers[1]) is nnx.Linear
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    assert relative_error(turned(inputs), model(inputs)) <= 1e-5
    assert {one.form for one in lr.find_factors(model).values()} == {"factored"}
    sizes = [x.size for x in jax.tree.leaves(nnx.state(turned, nnx.Param))]
    biases = 9 + 9 + 4
    assert sum(sizes) == 3 * (6 + 9 - 3) + 9 * 9 + 2 * (9 + 4) + biases
    assert rules_of(turned)[-1] == (".*", "dense")


@pytest.mark.parametrize(
    "forms, message",
    [
        ({"layers/7": "gauge"}, "must name low-rank layers, got .'layers/7'."),
        ({"layers/0": "sparse"}, "form: must be one of .*'merged'.*got 'sparse'"),
    ],
)
def test_what_is_not_there_is_refused(model, forms, message):
    with pytest.raises(UserError, match=message):
        take_forms(model, forms)
