"""Checkpoints: bit for bit there and back, at lower ranks, reading what is kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saved_models
from flax import nnx
from saved_models import (
    ACTIVE,
    FULL,
    INPUTS,
    LOWER,
    Net,
    Scanned,
    arrays,
    assert_same,
    low_rank,
    structure,
)

import lowrank_jax
from lowrank_jax import checkpoint
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.surgery import truncate

folder = saved_models.folder

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


def test_the_version_is_the_packages_own(folder):
    """(bug 26) Also where the project itself was never installed."""
    metadata = checkpoint.open_checkpoint(folder).metadata
    assert metadata["library_version"] == lowrank_jax.__version__
    assert metadata["format_version"] == 3


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
    own = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))  # others share these
    nnx.update(model, own)
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


def test_nothing_that_can_run_is_in_a_checkpoint(folder):
    """Arrays and JSON only: no pickled object anywhere."""
    for path in folder.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle", ".py", ".npy")
        if path.is_file() and path.name in ("_METADATA", "metadata"):
            json.loads(path.read_text())
