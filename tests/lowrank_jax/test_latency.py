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
    keys = [key.rpartition(" ")[0] for key in found["layers"]]  # less a digest
    assert keys == [
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


def test_equal_layers_at_other_ranks_have_their_own_times():
    """Each is measured at ranks that it has; the higher one's are not the lower's."""
    model = lr.truncate(two_equal_layers(), {"layers/0": 12, "layers/1": 2})
    table = latency.LatencyTable()
    ranks = lr.get_ranks(model)
    found = table.times(model, INPUTS, forms=("factored",), at_ranks=ranks)
    for path in ("layers/0", "layers/1"):
        assert sorted(found.layers[path].forms["factored"]) == [2, 12]
    for higher in ({"layers/1": 3}, {"layers/0": 99}):
        with pytest.raises(UserError, match="rank must be at most the active one"):
            table.times(model, INPUTS, at_ranks=ranks | higher)


def test_what_sets_a_layers_time_is_in_its_name():
    """Dilation and scheme, for which shapes are the same; not the values."""
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")

    def key(rule="full", **options):
        keys = nnx.Rngs(options.pop("seed", 0))
        conv = nnx.Conv(4, 4, (3, 3), rngs=keys, **options)
        table = latency.LatencyTable(points=1)
        table.times(
            lr.factorize(nnx.Sequential(conv), [(".*", rule)]), x, forms=(MERGED,)
        )
        (name,) = table.layers
        return name

    names = [key(), key(kernel_dilation=2), key({"scheme": 3}), key({"with_s": True})]
    assert len(set(names)) == 4
    assert key(seed=1) == names[0]


def test_a_layer_that_is_called_twice(tmp_path):
    """It is measured once, and counts twice, by a table that says its time."""
    layer = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
    once = lr.factorize(nnx.Sequential(layer))
    twice = lr.factorize(nnx.Sequential(layer, layer))
    path = tmp_path / "table.json"
    table = latency.LatencyTable(path, points=1)
    assert table.times(once, INPUTS).layers.keys() == {"layers/0"}
    before = path.read_bytes()
    rows = latency.called_layers(twice, INPUTS)
    assert [owner for owner, _, _ in rows] == ["layers/0", "layers/0"]
    assert table.times(twice, INPUTS).layers.keys() == {"layers/0"}
    assert path.read_bytes() == before


def test_what_another_process_wrote_stays(table, tmp_path):
    """Layers of both are in the file, which anybody may read; nothing else is left."""
    path = tmp_path / "table.json"
    one, other = (latency.LatencyTable(path, points=1) for _ in range(2))
    for number, table in enumerate((one, other)):
        layer = nnx.Linear(4 + number, 3, rngs=nnx.Rngs(0))
        inputs = jax.ShapeDtypeStruct((1, 4 + number), "float32")
        table.times(lr.factorize(nnx.Sequential(layer)), inputs)
    assert len(json.loads(path.read_text())["layers"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    assert path.stat().st_mode & 0o044


def test_a_refused_model_leaves_the_table_whole(tmp_path):
    """And is named by its layer's path."""
    path = tmp_path / "table.json"
    table = latency.LatencyTable(path, points=1)
    gauge = lr.truncate(two_equal_layers(), {}, form="gauge")
    with pytest.raises(UserError, match="^layers/2: .*rank must be 5"):
        table.times(gauge, INPUTS)
    table.times(two_equal_layers(), INPUTS)
    assert len(latency.LatencyTable(path).layers) == 2


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
        before = path.read_bytes()
        taken = latency.LatencyTable(path, any_device=True)  # at further ranks
        taken.times(two_equal_layers(), INPUTS, forms=("factored",))
        assert path.read_bytes() == before  # what is measured here is not of a TPU

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
        with pytest.raises(UserError, match="forms: must be one at least, got none"):
            latency.LatencyTable().times(two_equal_layers(), INPUTS, forms=())
        with pytest.raises(UserError, match="form: must be one of .*, got 'sparse'"):
            latency.LatencyTable().times(two_equal_layers(), INPUTS, forms=("sparse",))
