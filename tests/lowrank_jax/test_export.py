"""Files for other programs: what they hold, that they are the model, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from messages import check_form
from reference import relative_error

from lowrank_jax import checkpoint, export
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.ranks import at_fraction
from lowrank_jax.surgery import merge, truncate

EXAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


class Net(nnx.Module):
    """A convolution, BatchNorm, two dense layers, dropout, a bfloat16 scale."""

    def __init__(self, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.conv = nnx.Conv(3, 12, (3, 3), strides=2, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.hidden = nnx.Linear(192, 20, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(20, 5, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = nnx.relu(self.norm(self.conv(images)))
        hidden = nnx.relu(self.hidden(features.reshape(images.shape[0], -1)))
        return self.head(self.dropout(hidden))


def make(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> nnx.Module:
    model = factorize(Net(nnx.Rngs(seed), dtype))
    model.train()
    model(images(9))  # statistics that are not those of a new model
    model.eval()
    return model


def images(count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).normal(size=(count, 8, 8, 3)), "f4")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2])
def test_safetensors_hold_the_model_bit_for_bit(fraction, dtype, tmp_path):
    """Its ranks too, into another model of the structure, abstract or not."""
    model = make(dtype=dtype)
    model = truncate(model, at_fraction(get_ranks(model), fraction))
    lower = {"conv": 2, "hidden": 3, "head": 1}
    for ranks in (get_ranks(model), lower):  # cut, and masked below that
        set_ranks(model, ranks)
        export.save_safetensors(tmp_path / "m", model, metadata={"config": {"a": 1}})
        for other in (make(1, dtype), nnx.eval_shape(lambda: make(1, dtype))):
            loaded = export.load_safetensors(tmp_path / "m", other)
            assert get_ranks(loaded) == ranks
            assert max_ranks(loaded) == max_ranks(model)
            items = map(checkpoint.model_items, (loaded, model))
            ours, theirs = map(checkpoint.flatten, items)
            assert ours.keys() == theirs.keys()
            for key, array in ours.items():
                assert array.dtype == theirs[key].dtype
                np.testing.assert_array_equal(array, theirs[key])
    assert export.read_safetensors(tmp_path / "m").metadata["config"] == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_programs_find_arrays_by_path_and_ranks_in_the_header(tmp_path):
    model = make()
    export.save_safetensors(tmp_path / "m", model)
    arrays = safetensors.numpy.load_file(tmp_path / "m")
    np.testing.assert_array_equal(
        arrays["params/hidden/factors/u"], model.hidden.factors.u[...]
    )
    with safetensors.safe_open(tmp_path / "m", framework="numpy") as file:
        header = file.metadata()
    assert json.loads(header["ranks"]) == get_ranks(model)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2])
def test_stablehlo_is_the_model_at_any_batch(fraction):
    """In evaluation mode, at three sizes of the model; the weights are inside, and a
    masked model is one at its active ranks."""
    model = make()
    ranks = at_fraction(get_ranks(model), fraction)
    cut = truncate(model, ranks)
    set_ranks(model, ranks)
    for one in (cut, model, merge(cut)):
        one.train()  # the program evaluates all the same
        function = export.from_stablehlo(export.to_stablehlo(one, EXAMPLE))
        one.eval()
        for count in (1, 3, 17):
            found = function(images(count))
            assert relative_error(found, one(images(count))) <= 1e-6
    smaller = export.to_stablehlo(truncate(model, at_fraction(ranks, 0.5)), EXAMPLE)
    assert len(smaller) < len(export.to_stablehlo(cut, EXAMPLE))


def test_one_program_runs_at_any_rank():
    """It is the cut model, at ranks of each layer's own, at any batch."""
    model = make()
    program = export.to_stablehlo(model, EXAMPLE, any_rank=True)
    function, full = export.from_stablehlo(program), get_ranks(model)
    ones = dict.fromkeys(full, 1)
    for ranks in (full, at_fraction(full, 0.5), ones, {**full, "hidden": 2}):
        cut = truncate(model, ranks)
        factors = export.factor_arrays(cut)
        for count in (1, 6):
            found = function(factors, images(count))
            assert relative_error(found, cut(images(count))) <= 1e-6
    set_ranks(model, ones)
    for bad in (model, truncate(model, dict.fromkeys(full, 0))):
        with pytest.raises(UserError, match="^conv: rank must be at least 1, and") as e:
            export.factor_arrays(bad)
        check_form(str(e.value))


def test_stablehlo_names_the_platforms_it_is_for():
    program = export.to_stablehlo(make(), EXAMPLE)
    assert jax.export.deserialize(bytearray(program)).platforms == export.PLATFORMS


class Counts(nnx.Module):
    """A model that decides by the size of the batch, in one of two ways."""

    def __init__(self, by_len: bool):
        self.by_len = by_len

    def __call__(self, inputs: jax.Array) -> jax.Array:
        size = len(inputs) if self.by_len else inputs.shape[0]
        return inputs[:2] if size > 3 else inputs


def test_what_cannot_be_exported_is_refused():
    for example in ((), (jnp.float32(1.0),)):
        with pytest.raises(
            UserError, match="^example: must be the model's inputs"
        ) as e:
            export.to_stablehlo(make(), *example)
        check_form(str(e.value))
    for model in (Counts(False), Counts(True)):
        with pytest.raises(UserError, match="^model: must run on batches of any size"):
            export.to_stablehlo(model, jnp.ones((1, 2)))
    with pytest.raises(
        UserError, match="^program: must be one of to_stablehlo, got 5 b"
    ):
        export.from_stablehlo(b"abcde")


def test_files_of_something_else_are_refused(tmp_path):
    """Not there, no safetensors, another program's, arrays or header changed since."""
    path, model = tmp_path / "m", make()
    with pytest.raises(UserError, match="^file: must be a safetensors file, got .*m"):
        export.read_safetensors(path)
    export.save_safetensors(path, model)
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
    about = json.loads(header["lowrank_jax"])
    smaller = {**arrays, "params/head/bias": np.zeros(3, np.float32)}
    changed = {**header, "lowrank_jax": json.dumps({**about, "ranks": {}})}
    for given in (
        b"abc",
        (arrays, None),
        (arrays, {"lowrank_jax": "["}),
        (arrays, {"lowrank_jax": "[]"}),
        (arrays, changed),
        (smaller, header),
        ({**arrays, "more": np.zeros(1)}, header),
    ):
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            safetensors.numpy.save_file(given[0], path, metadata=given[1])
        with pytest.raises(
            UserError, match="^file: must be a safetensors file of this"
        ):
            export.load_safetensors(path, model)


def test_files_of_another_model_are_refused_by_their_differences(tmp_path):
    export.save_safetensors(tmp_path / "m", make())
    wider = factorize(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(
        UserError, match=r"low-rank layers must be \[''\], as in the mod"
    ):
        export.load_safetensors(tmp_path / "m", wider)
    other = make(dtype=jnp.bfloat16)
    with pytest.raises(
        UserError, match="must be of this model, got params/conv/.*bfloat"
    ):
        export.load_safetensors(tmp_path / "m", other)
