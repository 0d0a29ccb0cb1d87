"""Checkpoints: bit for bit there and back, at lower ranks, and refusals that help."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from flax import nnx

import lowrank_jax
from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.surgery import truncate


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


MASKED = {**LOWER, "first": 6}
CASES = {
    "full": (Net, False, {}, {}),
    "masked, scales": (Net, True, {}, MASKED),
    "cut, one to nothing": (Net, False, LOWER, {}),
    "cut, scales, masked": (Net, True, MASKED, {**MASKED, "again": 0}),
    "all cut to nothing": (Net, True, {p: 0 for p in FULL}, {}),
    "stacked": (Scanned, False, {"layers": [3, 1, 2]}, {"layers": [3, 0, 2]}),
}


@pytest.mark.parametrize("case", CASES)
def test_loading_gives_back_what_was_saved(case, tmp_path):
    """(7) Arrays, dtypes, allocated and active ranks, statistics; outputs bit for
    bit."""
    kind, with_s, cut, active = CASES[case]
    model = truncate(low_rank(kind, with_s), cut)
    set_ranks(model, active)
    checkpoint.save(tmp_path / "new", model, step=3, metadata={"config": {"a": [1]}})
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    assert saved.step == 3 and saved.metadata["config"] == {"a": [1]}
    assert saved.metadata["ranks"] == get_ranks(model)
    assert saved.max_ranks == max_ranks(model)
    found = checkpoint.load(saved, structure(kind, with_s))
    assert_same(found, model)
    np.testing.assert_array_equal(found(INPUTS), model(INPUTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A masked model, saved once for the tests that only read."""
    model = low_rank()
    set_ranks(model, ACTIVE)
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(path, model, step=5)
    return path


@pytest.mark.parametrize(
    "ranks",
    [LOWER, {"tied": 2}, {"conv": 1, "half": 4}, {p: 0 for p in FULL}, {}],
    ids=["lower", "alias", "one number", "nothing", "as saved"],
)
def test_loading_at_lower_ranks_equals_truncating(ranks, folder):
    """(7) Bit for bit; layers that are not named are cut to their active rank."""
    found = checkpoint.load(
        checkpoint.open_checkpoint(folder), structure(), ranks=ranks
    )
    masked = low_rank()
    set_ranks(masked, ACTIVE)
    aliases = {"tied": "again"}
    named = {aliases.get(path, path): rank for path, rank in ranks.items()}
    expected = truncate(masked, {**get_ranks(masked), **named})
    assert_same(found, expected)
    np.testing.assert_array_equal(found(INPUTS), expected(INPUTS))


def test_the_given_model_does_not_matter_but_for_its_structure(folder):
    """Concrete or abstract, cut or not: the checkpoint decides, the model is left
    alone."""
    saved = checkpoint.open_checkpoint(folder)
    given = truncate(low_rank(), {"again": 2})
    found = checkpoint.load(saved, given)
    assert_same(found, checkpoint.load(saved, structure()))
    assert get_ranks(given)["again"] == 2 and get_ranks(found)["again"] == 4


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"again": 9, "half": 6}, r"(?s)again: .*\[0, 4\].*half: .*\[0, 5\]"),
        ({"again": 5}, r"again: .*\[0, 4\].*masked do not come back"),
        ({"conv": [1, 4]}, r"conv: .*\[0, \[1, 3\]\]"),
        ({"conv": [2, 1]}, r"conv: .*\[0, \[1, 3\]\]"),
        ({"again": True}, "again: rank must be a whole number, got True"),
        ({"body": 1}, r"got \['body'\]"),
    ],
)
def test_ranks_above_the_stored_ones_are_refused(ranks, message, folder):
    """Nothing is padded; all offenders are named."""
    saved = checkpoint.open_checkpoint(folder)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved, structure(), ranks=ranks)


def test_a_rank_cannot_be_loaded_back_after_a_cut(tmp_path):
    """The limit is what is in the file, not what the model could have."""
    checkpoint.save(tmp_path / "cut", truncate(low_rank(), {"again": 2}))
    saved = checkpoint.open_checkpoint(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"again: rank must be in \[0, 2\], got 3"):
        checkpoint.load(saved, structure(), ranks={"again": 3})


def test_the_ranks_of_the_given_model_do_not_bound_what_is_loaded(folder):
    """Masked or cut below the checkpoint's, with a stack: its ranks come back."""
    saved = checkpoint.open_checkpoint(folder)
    given = truncate(low_rank(), {"again": 1, "conv": [1, 0]})
    set_ranks(given, {"again": 0, "half": 1, "conv": 0})
    assert_same(checkpoint.load(saved, given), checkpoint.load(saved, structure()))
    ranks = {"again": 3, "half": 4}
    found = checkpoint.load(saved, given, ranks=ranks)
    assert_same(found, checkpoint.load(saved, structure(), ranks=ranks))
    assert get_ranks(found) == {"again": 3, "conv": [1, 3], "first": 6, "half": 4}


class Odd(nnx.Module):
    """A module of somebody's own that is named like ours and holds a `u`."""

    def __init__(self, rngs: nnx.Rngs):
        self.factors = nnx.Dict(
            u=nnx.Param(jnp.arange(6.0).reshape(2, 3)),
            layer=nnx.Linear(4, 3, rngs=rngs),
        )
        self.block = nnx.Dict(factors=nnx.Linear(3, 4, rngs=rngs))

    def __call__(self, inputs):
        return self.block["factors"](
            self.factors["layer"](inputs) + self.factors["u"][0]
        )


@pytest.mark.parametrize("ranks", [None, {"factors/layer": 2, "block/factors": 1}])
def test_a_module_named_like_ours_is_saved_and_loaded(ranks, tmp_path):
    """(bug 8) What is a factor's comes from the structure, not from a name."""
    rules = [("factors/u", "dense"), (".*", "full")]
    model = factorize(Odd(nnx.Rngs(0)), rules)
    checkpoint.save(tmp_path / "odd", model)
    saved = checkpoint.open_checkpoint(tmp_path / "odd")
    assert sorted(saved.metadata["rank_axes"]) == [
        *("block/factors/factors/u", "block/factors/factors/v"),
        *("factors/layer/factors/u", "factors/layer/factors/v"),
    ]
    abstract = nnx.eval_shape(lambda: factorize(Odd(nnx.Rngs(1)), rules))
    found = checkpoint.load(saved, abstract, ranks=ranks)
    assert_same(found, truncate(model, ranks or {}))


class Alike(nnx.Module):
    """A layer, and a Param whose path ends in that of the layer's factor."""

    def __init__(self, size: int):
        self.layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        own = nnx.Dict(u=nnx.Param(jnp.ones((4, size))))
        self.x = nnx.Dict(layer=nnx.Dict(factors=own))


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_a_param_with_the_path_of_a_factor_at_its_end_is_not_cut(item, tmp_path):
    """Only a moment's path has something before the parameter's."""
    rules = [("layer", "full")]
    ignored = pytest.warns(UserWarning, match="x/layer/factors/u")
    with ignored:
        large, small = (factorize(Alike(size), rules) for size in (6, 3))
    states = [
        optax.adam(0.1).init(nnx.as_pure(nnx.state(m, nnx.Param)))
        for m in (large, small)
    ]
    checkpoint.save(tmp_path / "new", large, items={"opt_state": states[0]})
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    assert list(saved.metadata["rank_axes"]) == ["layer/factors/u", "layer/factors/v"]
    with pytest.raises(UserError, match=rf"(?s){item}/.*x/layer/factors/u: .*\[4, 6\]"):
        if item == "params":
            checkpoint.load(saved, small)
        else:
            checkpoint.restore(saved, {"opt_state": states[1]})
    cut = truncate(large, {"layer": 2})
    assert_same(checkpoint.load(saved, large, ranks={"layer": 2}), cut)
    state = optax.adam(0.1).init(nnx.as_pure(nnx.state(cut, nnx.Param)))
    found = checkpoint.restore(saved, {"opt_state": state})["opt_state"]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, state)


def test_two_arrays_with_one_path_are_refused_by_name(tmp_path):
    """(bug 8) "x/y" next to "x" that holds "y": nothing is lost in silence."""
    inner = nnx.Dict(y=nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
    model = nnx.Dict({"x": inner, "x/y": nnx.LayerNorm(2, rngs=nnx.Rngs(0))})
    with pytest.raises(UserError, match=r"got several for \['x/y/bias', 'x/y/scale'\]"):
        checkpoint.save(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_the_version_is_the_packages_own(folder):
    """(bug 26) Also where the project itself was never installed."""
    metadata = checkpoint.open_checkpoint(folder).metadata
    assert metadata["library_version"] == lowrank_jax.__version__
    assert metadata["format_version"] == 2


class Longer(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.more = nnx.LayerNorm(3, rngs=rngs)


OTHERS = {
    "width": (
        lambda: structure(width=9),
        ["params/again/factors/u", "params/first/bias", "params/half/factors/u"],
    ),
    "narrow": (lambda: structure(width=7), ["params/again/factors/v"]),
    "dtype": (
        lambda: structure(dtype=jnp.float32),
        ["params/half/bias", "params/half/factors/v", "bfloat16", "float32"],
    ),
    "scales": (lambda: structure(with_s=True), ["params/conv/factors/s"]),
    "more": (lambda: structure(Longer), ["params/more/bias", "not in the checkpoint"]),
    "layers": (lambda: structure(Scanned), ["['layers']", "'again'"]),
    "dense": (lambda: nnx.eval_shape(lambda: Net(nnx.Rngs(0))), ["[]", "'again'"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused_by_path(case, folder):
    """(7) Other sizes, wider or narrower, dtypes, layers: all differences are named."""
    build, names = OTHERS[case]
    saved = checkpoint.open_checkpoint(folder)
    for ranks in (None, {"again": 1} if case not in ("layers", "dense") else {}):
        with pytest.raises(ValueError) as error:
            checkpoint.load(saved, build(), ranks=ranks)
        for name in (*names, str(folder)):
            assert name in str(error.value), str(error.value)


def test_dense_models_have_the_same_schema(tmp_path):
    """A model without low-rank layers is saved and loaded like any other."""
    model = Net(nnx.Rngs(0))
    checkpoint.save(tmp_path / "dense", model)
    saved = checkpoint.open_checkpoint(tmp_path / "dense")
    assert saved.max_ranks == {} and saved.step == 0
    found = checkpoint.load(saved, nnx.eval_shape(lambda: Net(nnx.Rngs(1))))
    assert_same(found, model)


def test_the_optimizer_state_goes_along(tmp_path):
    """Further items come back in the shape of their template, or by name if missing."""
    model, optimizer = truncate(low_rank(), LOWER), optax.adamw(1e-2)
    params = checkpoint.model_items(model)["params"]
    state = jax.tree.map(lambda x: x + 3, optimizer.init(params))
    items = {"opt_state": state, "sampler": {"position": jnp.int32(4)}}
    checkpoint.save(tmp_path / "run", model, items=items)
    saved = checkpoint.open_checkpoint(tmp_path / "run")
    template = {
        "opt_state": jax.eval_shape(optimizer.init, params),
        "sampler": {"position": jax.ShapeDtypeStruct((), jnp.int32)},
    }
    found = checkpoint.restore(saved, template)
    assert jax.tree.structure(found) == jax.tree.structure(items)
    for leaf, expected in zip(*map(jax.tree.leaves, (found, items)), strict=True):
        np.testing.assert_array_equal(leaf, expected, strict=True)
    assert_same(checkpoint.load(saved, structure()), model)
    with pytest.raises(ValueError, match=r"teacher: is not in the checkpoint"):
        checkpoint.restore(saved, {"teacher": params})
    other = optax.sgd(1e-2, momentum=0.9)
    with pytest.raises(ValueError, match=r"opt_state/0/trace/.*not in the checkpoint"):
        checkpoint.restore(saved, {"opt_state": jax.eval_shape(other.init, params)})


def test_the_latest_of_several_steps_is_opened(tmp_path):
    """By number, not by name; old ones go; a step can be named by its folder."""
    model = low_rank(Scanned)
    writer = checkpoint.CheckpointWriter(tmp_path / "run" / "checkpoints", keep=2)
    for step in (8, 9, 10):
        model.layers.bias.set_value(jnp.full((3, 4), float(step)))
        writer.save(step, model, {"note": step})
    writer.wait()
    writer.close()
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["10", "9"]
    for path, step in ((tmp_path / "run", 10), (root, 10), (root / "9", 9)):
        saved = checkpoint.open_checkpoint(path)
        assert saved.step == step == saved.metadata["note"]
        found = checkpoint.load(saved, structure(Scanned))
        assert np.all(np.asarray(found.layers.bias[...]) == step)


def test_what_is_given_to_a_save_may_be_donated_at_once(tmp_path):
    """The writer works in the background on arrays of its own."""
    model = low_rank(Scanned)
    expected = arrays(model)["layers/bias"].copy() + 1
    writer = checkpoint.CheckpointWriter(tmp_path / "run")
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = bump(nnx.state(model, nnx.Param))
    nnx.update(model, state)
    writer.save(1, model, {})
    bump(state)
    writer.close()
    found = checkpoint.load(
        checkpoint.open_checkpoint(tmp_path / "run"), structure(Scanned)
    )
    np.testing.assert_array_equal(found.layers.bias[...], expected)


def test_values_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    """In the caller's own thread, with nothing left behind that looks complete."""
    writer = checkpoint.CheckpointWriter(tmp_path / "run")
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, low_rank(Scanned), {"config": object()})
    writer.close()
    assert not list((tmp_path / "run").iterdir())


def test_an_existing_folder_is_refused(tmp_path):
    """Even an empty one: nothing is overwritten or mixed."""
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"there.*Nothing is overwritten"):
        checkpoint.save(tmp_path / "there", low_rank(Scanned))
    with pytest.raises(FileExistsError, match="must not exist yet, got .*there"):
        checkpoint.check_new_folder(tmp_path / "there")
    checkpoint.check_new_folder(tmp_path / "not there")


def metadata_file(folder: Path) -> Path:
    return folder / "5" / "metadata" / "metadata"


def edit(folder: Path, **changes: Any) -> None:
    metadata = json.loads(metadata_file(folder).read_text())
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    metadata_file(folder).write_text(json.dumps(metadata))


def half_written(folder: Path) -> None:
    (folder / "5").rename(folder / "5.orbax-checkpoint-tmp")


BROKEN = {
    "missing": (shutil.rmtree, FileNotFoundError, "not there"),
    "a file": (
        lambda f: (shutil.rmtree(f), f.write_text("")),
        FileNotFoundError,
        "must be a folder",
    ),
    "empty": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        FileNotFoundError,
        "complete checkpoint",
    ),
    "foreign": (
        lambda f: (shutil.rmtree(f / "5"), (f / "model.bin").touch()),
        FileNotFoundError,
        "model.bin",
    ),
    "temporary": (half_written, FileNotFoundError, "half-written"),
    "unmarked": (
        lambda f: (f / "5" / "_CHECKPOINT_METADATA").unlink(),
        FileNotFoundError,
        "half-written",
    ),
    "no metadata": (
        lambda f: metadata_file(f).unlink(),
        FileNotFoundError,
        "half-written",
    ),
    "broken JSON": (
        lambda f: metadata_file(f).write_text('{"step": 5,'),
        ValueError,
        "must be JSON",
    ),
    "other JSON": (
        lambda f: metadata_file(f).write_text("[1, 2]"),
        ValueError,
        "another program",
    ),
    "binary": (
        lambda f: metadata_file(f).write_bytes(b"\xff\xfe\x00"),
        ValueError,
        "must be JSON",
    ),
    "no version": (
        lambda f: edit(f, format_version=None),
        ValueError,
        "format_version",
    ),
    "newer": (
        lambda f: edit(f, format_version=3, library_version="9.9"),
        ValueError,
        r"must be of format 2, got 3(.|\n)*9\.9",
    ),
    "older": (
        lambda f: edit(f, format_version=1, library_version="0.1", rank_axes=None),
        ValueError,
        r"must be of format 2, got 1(.|\n)*0\.1",
    ),
    "no ranks": (lambda f: edit(f, ranks=None), ValueError, r"missing: \['ranks'\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_checkpoint_gives_one_clear_error(case, folder, tmp_path):
    """It names the path and the way out."""
    damage, kind, message = BROKEN[case]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    checkpoint.open_checkpoint(copy)
    damage(copy)
    with pytest.raises(kind, match=message) as error:
        checkpoint.open_checkpoint(copy)
    assert isinstance(error.value, UserError) and str(copy) in str(error.value)


def test_an_older_complete_step_stands_in_for_a_broken_one(folder, tmp_path):
    """A run that was killed while saving step 7 goes on from step 5."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "5", copy / "6")
    shutil.copytree(copy / "5", copy / "7.orbax-checkpoint-tmp")
    (copy / "6" / "_CHECKPOINT_METADATA").unlink()
    saved = checkpoint.open_checkpoint(copy)
    assert saved.path.name == "5"
    checkpoint.load(saved, structure())


def bytes_read() -> int:
    name = "/tensorstore/kvstore/file/bytes_read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])


class Wide(nnx.Module):
    """Two matrices; orbax keeps columns below 1 KiB in its index, which is read
    whole."""

    def __init__(self, rngs: nnx.Rngs):
        rule = [(".*", {"max_rank": 128})]
        self.up = factorize(nnx.Linear(512, 2048, rngs=rngs), rule)
        self.down = factorize(nnx.Linear(2048, 512, rngs=rngs), rule)


def test_cutting_while_loading_reads_little_more_than_it_keeps(tmp_path):
    """At a quarter of the ranks at most 1.5 times the bytes that are kept."""
    random = np.random.default_rng(0)
    model = jax.tree.map(  # no need of two large decompositions
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), structure(Wide)
    )
    set_ranks(model, {"up": 128, "down": 128})
    checkpoint.save(tmp_path / "wide", model)
    saved = checkpoint.open_checkpoint(tmp_path / "wide")
    sizes = {}
    for ranks in (None, {"up": 32, "down": 32}):
        before = bytes_read()
        small = checkpoint.load(saved, structure(Wide), ranks=ranks)
        kept = sum(x.nbytes for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
        sizes[kept] = bytes_read() - before
    assert [*sizes] == [2560 * (2 * rank + 1) * 4 for rank in (128, 32)]
    for kept, read in sizes.items():
        assert 0.5 * kept < read <= 1.5 * kept
    checkpoint.save(tmp_path / "small", small)
    assert size_of(tmp_path / "small") < 0.3 * size_of(tmp_path / "wide")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_nothing_that_can_run_is_in_a_checkpoint(folder):
    """Arrays and JSON only: no pickled object anywhere."""
    for path in folder.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle", ".py", ".npy")
        if path.is_file() and path.name in ("_METADATA", "metadata"):
            json.loads(path.read_text())
