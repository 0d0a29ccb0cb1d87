"""Sizes on one set of weights: what does not fit is refused by one message."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from messages import check_form

import lowrank_jax as lr
from lowrank_jax.elastic import Elastic

EXAMPLE = jax.ShapeDtypeStruct((1, 5, 4), jnp.float32)
GAUGE = {"": 2}


def gauge() -> nnx.Module:
    model = lr.factorize(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    return lr.truncate(model, GAUGE, form="gauge")


def made(model: nnx.Module | None = None, **changes: Any) -> Elastic:
    given = {"sizes": {"half": {"first": 3}}, "example": [EXAMPLE], **changes}
    sizes, example = given.pop("sizes"), given.pop("example")
    return Elastic(
        saved_models.low_rank() if model is None else model, sizes, *example, **given
    )


def masked() -> nnx.Module:
    model = saved_models.low_rank()
    lr.set_ranks(model, {"first": 2})
    return model


BAD: Mapping[str, tuple[Callable[[], Any], str]] = {
    "no sizes": (lambda: made(sizes={}), "sizes: must be at least one"),
    "unknown layer": (
        lambda: made(sizes={"a": {"b": 1}}),
        r"sizes\['a'\]: paths: must",
    ),
    "too high": (
        lambda: made(sizes={"a": {"first": 7}}),
        r"sizes\['a'\]: first: rank m",
    ),
    "above the active rank": (
        lambda: made(masked()),
        r"sizes\['half'\]: first: rank mus",
    ),
    "no rank": (
        lambda: made(sizes={"a": {"first": "b"}}),
        r"\['a'\]: first: rank must",
    ),
    "merged": (
        lambda: made(lr.merge(saved_models.low_rank())),
        "model: must have factor",
    ),
    "gauge": (lambda: made(gauge()), "model: must have factored layers"),
    "no example": (lambda: made(example=[]), "example: must be the model's inputs"),
    "no batch": (lambda: made(example=[np.float32(1)]), "example: must be the model's"),
    "no batches": (lambda: made(batches=()), "batches: must be whole numbers above 0"),
    "a batch of 0": (lambda: made(batches=(0, 1)), "batches: must be whole numbers"),
    "a batch twice": (lambda: made(batches=(2, 2)), "batches: must be whole numbers"),
    "statistics of no size": (
        lambda: made(statistics={"b": nnx.State({})}),
        r"statistics: must be of the sizes \['half'\]",
    ),
    "statistics of nothing": (
        lambda: made(statistics={"half": nnx.State({})}),
        r"statistics\['half'\]: must be a model's nnx.BatchStat",
    ),
    "no rows": (
        lambda: made(forward=lambda model, inputs: model(inputs).mean()),
        "forward: must return arrays with a row for each of 1 inputs",
    ),
    "abstract": (
        lambda: made(saved_models.structure()),
        "model: must have its arrays on",
    ),
    "unknown size": (
        lambda: made()(np.zeros((1, 5, 4), "f4"), size="b"),
        "size: must be",
    ),
    "unknown default": (lambda: setattr(made(), "size", "b"), "size: must be one of"),
    "too many rows": (
        lambda: made()(np.zeros((2, 5, 4), "f4")),
        "inputs: must be float32",
    ),
    "no rows at all": (lambda: made()(np.zeros((0, 5, 4), "f4")), "inputs: must be"),
    "another shape": (lambda: made()(np.zeros((1, 4, 4), "f4")), "inputs: must be"),
    "another dtype": (lambda: made()(np.zeros((1, 5, 4))), "inputs: must be"),
    "no array": (lambda: made()(1.0), "inputs: must be"),
    "no inputs": (lambda: made()(), "inputs: must be .* got none"),
    "no program": (lambda: made().program("half", 3), "rows: must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    make, match = BAD[case]
    with pytest.raises(lr.UserError, match=match) as error:
        make()
    check_form(str(error.value))


def test_arrays_on_several_devices_are_refused():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = jax.device_put(saved_models.low_rank(), everywhere)
    with pytest.raises(lr.UserError, match="model: must have its arrays on one device"):
        Elastic(model, {"whole": {}}, EXAMPLE)
