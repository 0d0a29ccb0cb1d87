"""The table of latencies: what is measured, kept, read again, and refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax import latency
from lowrank_jax.errors import UserError
from lowrank_jax.times import MERGED

INPUTS = jax.ShapeDtypeStruct((2, 12), "float32")


def two_equal_layers() -> nnx.Module:
    keys = nnx.Rngs(0)
    return lr.factorize(
        nnx.Sequential(
            *(nnx.Linear(12, 12, rngs=keys) for _ in range(2)),
            nnx.Linear(12, 5, rngs=keys),
        )
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("latency") / "new" / "table.json"
    forms = ("factored", "gauge", MERGED)
    latency.LatencyTable(path, points=3).times(two_equal_layers(), INPUTS, forms=forms)
    return path


def changed(table: Path, output: Path, **new) -> Path:
    """A copy with other contents."""
    output.write_text(json.dumps(json.loads(table.read_text()) | new))
    return output


def test_equal_layers_are_measured_once(table):
    """At 1, the active rank, and evenly between, in every form."""
    found = json.loads(table.read_text())
    assert found["device"] == latency.device_name()
    assert sorted(found["layers"]) == [
        "LowRankLinear.__call__ float32[12x12] float32[2,12] -> float32[2,12]",
        "LowRankLinear.__call__ float32[12x5] float32[2,12] -> float32[2,5]",
    ]
    for entry, ranks in zip(
        found["layers"].values(), ("1 12 4 8", "1 2 3 5"), strict=True
    ):
        assert entry.keys() == {"dense", "factored", "gauge"}
        for form in ("factored", "gauge"):
            assert sorted(entry[form]) == ranks.split()
        assert min(min(times.values()) for times in entry.values()) > 0


def test_what_is_known_is_not_measured_again(table, tmp_path):
    """Ratios that nothing has are still there: a thousandth of dense, twice dense."""
    layers = json.loads(table.read_text())["layers"]
    for entry in layers.values():
        dense = entry["dense"]["0"]
        for rank in entry["factored"]:
            entry["factored"][rank] = dense / 1000
        for rank in entry["gauge"]:
            entry["gauge"][rank] = 2 * dense
    path = changed(table, tmp_path / "table.json", layers=layers)
    before = path.read_bytes()
    times = latency.LatencyTable(path, points=3).times(
        two_equal_layers(), INPUTS, forms=("factored", "gauge", MERGED)
    )
    assert path.read_bytes() == before
    assert times.layers.keys() == {"layers/0", "layers/1", "layers/2"}
    for layer in times.layers.values():
        assert layer.at("factored", 3) < layer.dense_latency < layer.at("gauge", 2)
        assert layer.fastest(3) == "factored"
        assert layer.at(MERGED, 2) == layer.dense_latency
    # Another rank is measured, and written beside the others.
    latency.LatencyTable(path).times(
        two_equal_layers(),
        INPUTS,
        forms=("factored",),
        at_ranks={"layers/0": 7, "layers/1": 4, "layers/2": 5},
    )
    grown = json.loads(path.read_text())["layers"]
    square, head = grown.values()
    assert "7" in square["factored"] and set(square["factored"]) > {"1", "4"}
    assert square["factored"]["4"] == square["dense"]["0"] / 1000
    assert set(head["factored"]) == {"1", "2", "3", "5"}


def test_a_layer_that_is_called_twice(tmp_path):
    """A layer that is called twice is measured once."""
    layer = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
    once = lr.factorize(nnx.Sequential(layer))
    twice = lr.factorize(nnx.Sequential(layer, layer))
    path = tmp_path / "table.json"
    table = latency.LatencyTable(path, points=1)
    assert table.times(once, INPUTS).layers.keys() == {"layers/0"}
    before = path.read_bytes()
    assert table.times(twice, INPUTS).layers.keys() == {"layers/0"}
    assert path.read_bytes() == before


def test_models_run_as_they_would_be_used():
    """In evaluation mode, on arrays or on their shapes; each has a time."""
    model = nnx.Sequential(
        nnx.Linear(12, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    found = latency.measure({"one": model, "other": model}, INPUTS, rounds=2)
    more = latency.measure({"one": model}, np.ones((2, 12), np.float32), rounds=1)
    assert found.keys() == {"one", "other"} and min(*found.values(), *more.values()) > 0
    assert not model.layers[1].deterministic  # the model itself is left alone


class TestRefusals:
    def test_another_device(self, table, tmp_path):
        path = changed(table, tmp_path / "table.json", device="TPU v9, jax 9.9")
        with pytest.raises(UserError, match="this device, .*, got one of TPU v9, jax"):
            latency.LatencyTable(path)
        taken = latency.LatencyTable(path, any_device=True, points=3)
        taken.times(two_equal_layers(), INPUTS, forms=("factored",))
        assert json.loads(path.read_text())["device"] == "TPU v9, jax 9.9"

    @pytest.mark.parametrize(
        "layers",
        [
            3,
            {"a": 3},
            {"a": {"dense": 3}},
            {"a": {"dense": {"x": 3.0}}},
            {"a": {"dense": {"0": -1.0}}},
            {"a": {"dense": {"0": float("nan")}}},
            {"a": {"dense": {"0": True}}},
            {"a": {"dense": {"0": "3"}}},
            {"a": {"factored": {"1": 3.0}}},
        ],
    )
    def test_a_file_that_is_no_table(self, layers, table, tmp_path):
        path = changed(table, tmp_path / "table.json", layers=layers)
        with pytest.raises(UserError, match="must be a file that this library has wr"):
            latency.LatencyTable(path)

    def test_text_that_is_none(self, tmp_path):
        for number, text in enumerate(("", "[]", "{", '{"device": "x"}', "\0\xff")):
            path = tmp_path / str(number)
            path.write_text(text)
            with pytest.raises(UserError, match="latency table .*: must be a file"):
                latency.LatencyTable(path)

    def test_layers_that_are_not_called(self):
        model = nnx.Dict(
            used=nnx.Linear(12, 3, rngs=nnx.Rngs(0)),
            idle=nnx.Linear(12, 3, rngs=nnx.Rngs(0)),
        )

        class Model(nnx.Module):
            def __init__(self):
                self.parts = model

            def __call__(self, x):
                return self.parts["used"](x)

        with pytest.raises(UserError, match="model calls, got no call of parts/idle"):
            latency.LatencyTable().times(lr.factorize(Model()), INPUTS)

    def test_a_stack_for_a_scan(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(12, 12, rngs=rngs)

        class Model(nnx.Module):
            def __init__(self):
                self.layers = stack(nnx.Rngs(0))

            def __call__(self, x):
                return nnx.scan(
                    lambda x, layer: layer(x),
                    in_axes=(nnx.Carry, 0),
                    out_axes=nnx.Carry,
                )(x, self.layers)

        with pytest.raises(UserError, match="single layers, got a stack of them"):
            latency.LatencyTable().times(lr.factorize(Model()), INPUTS)

    def test_a_form_that_is_none(self):
        with pytest.raises(UserError, match="form: must be one of .*, got 'sparse'"):
            latency.LatencyTable().times(two_equal_layers(), INPUTS, forms=("sparse",))
