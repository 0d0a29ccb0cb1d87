"""Checkpoints move between meshes: every array gets the sharding of its template."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from lowrank_jax import checkpoint, factorize
from lowrank_jax.active import max_ranks
from lowrank_jax.errors import DamagedCheckpoint
from lowrank_jax.surgery import truncate

IN, OUT = 32, 48


class Net(nnx.Module):
    """A layer with factors large enough for several devices, a vector, a scalar."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(IN, OUT, rngs=rngs)
        self.scale = nnx.Param(jnp.float32(2.0))


def build() -> nnx.Module:
    return factorize(Net(nnx.Rngs(0)), [("layer", {"with_s": True})])


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    names = ("data", "tensor")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


SPECS = {
    "inputs": {"u": ("data", None), "v": (None, "data"), "bias": ("data",)},
    "ranks": {"u": (None, "data"), "v": ("data", None)},
    "both": {"u": ("data", "tensor"), "v": ("tensor", "data"), "s": ("tensor",)},
    "joined": {"u": (("data", "tensor"), None), "bias": (("data", "tensor"),)},
    "replicated": {},
}
LAYOUTS = {
    "8 by inputs": ((8,), "inputs"),
    "8 by ranks": ((8,), "ranks"),
    "4x2 by both": ((4, 2), "both"),
    "2x4 joined": ((2, 4), "joined"),
    "4 by inputs": ((4,), "inputs"),
    "2 replicated": ((2,), "replicated"),
}


def sharded(state, layout: str | None):
    """Shapes of a state under a layout's shardings; none for None."""
    if layout is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    shape, specs = LAYOUTS[layout]
    mesh = mesh_of(shape)

    def template(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        spec = PartitionSpec(*SPECS[specs].get(name, ()))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(template, state)


def abstract(layout: str | None) -> nnx.Module:
    """The model with shardings in the place of numbers."""
    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    return nnx.merge(graphdef, sharded(nnx.as_pure(params), layout), rest)


def placed(layout: str | None) -> nnx.Module:
    """The model itself, under a layout."""
    graphdef, params, rest = nnx.split(build(), nnx.Param, ...)
    params = nnx.as_pure(params)
    if layout is not None:
        wanted = jax.tree.map(lambda x: x.sharding, sharded(params, layout))
        params = jax.device_put(params, wanted)
    return nnx.merge(graphdef, params, rest)


def params_of(model: nnx.Module) -> dict[str, jax.Array]:
    return checkpoint.flatten(checkpoint.model_items(model)["params"])


def assert_same_numbers(found: nnx.Module, expected: nnx.Module) -> None:
    for key, array in params_of(expected).items():
        np.testing.assert_array_equal(params_of(found)[key], array, key, strict=True)


MOVES = [
    ("8 by inputs", None),
    (None, "8 by inputs"),
    ("8 by inputs", "4 by inputs"),
    ("8 by ranks", "4x2 by both"),
    ("4x2 by both", "2x4 joined"),
    ("2x4 joined", "8 by ranks"),
    ("2 replicated", "8 by inputs"),
    ("4x2 by both", None),
]


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_checkpoint_moves_to_another_mesh(source, target, tmp_path):
    """Same bits, under the shardings of the template, each part written once."""
    model = placed(source)
    items = {"moments": checkpoint.model_items(model)["params"]}
    checkpoint.save(tmp_path / "new", model, items=items)
    size = sum(x.nbytes for x in params_of(model).values())
    assert (tmp_path / "new/0/params/process_0.bin").stat().st_size == size
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    found = checkpoint.load(saved, abstract(target))
    assert_same_numbers(found, model)
    templates = checkpoint.model_items(abstract(target))["params"]
    moments = checkpoint.restore(saved, {"moments": templates})["moments"]
    device = SingleDeviceSharding(jax.devices()[0])
    for key, template in checkpoint.flatten(templates).items():
        for array in (params_of(found)[key], checkpoint.flatten(moments)[key]):
            assert array.sharding == (template.sharding or device), key
            np.testing.assert_array_equal(array, params_of(model)[key])


@pytest.mark.parametrize(("source", "target"), MOVES)
@pytest.mark.parametrize("rank", [8, 5, 0])
def test_a_checkpoint_is_cut_while_it_moves(source, target, rank, tmp_path):
    """Equal to truncating in memory; an axis that no longer divides is not split."""
    checkpoint.save(tmp_path / "new", placed(source))
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    found = checkpoint.load(saved, abstract(target), ranks={"layer": rank})
    assert max_ranks(found) == {"layer": rank}
    assert_same_numbers(found, truncate(build(), {"layer": rank}))
    if target is None or not rank:
        return
    shape, specs = LAYOUTS[target]
    split = dict(zip(("data", "tensor"), shape, strict=False))
    for key, array in params_of(found).items():
        spec = SPECS[specs].get(key.split("/")[-1], ())
        expected = [
            names
            if size % np.prod([split[n] for n in np.atleast_1d(names) if n]) == 0
            else None
            for size, names in zip(array.shape, spec, strict=False)
        ]
        wanted = NamedSharding(mesh_of(shape), PartitionSpec(*expected))
        assert array.sharding.is_equivalent_to(wanted, array.ndim), key


def test_a_concrete_template_keeps_its_devices(tmp_path):
    """A model that is on a mesh stays there; its numbers do not matter."""
    checkpoint.save(tmp_path / "new", placed(None))
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    model = placed("4x2 by both")
    found = checkpoint.load(saved, jax.tree.map(lambda x: x, model))
    for key, array in params_of(model).items():
        assert params_of(found)[key].sharding == array.sharding, key


def test_damage_to_one_device_s_part_is_found_under_any_sharding(tmp_path):
    """Also by a template that splits the part over other devices."""
    checkpoint.save(tmp_path / "new", placed("8 by inputs"))
    file = tmp_path / "new/0/params/process_0"
    pieces = json.loads(file.with_suffix(".json").read_text())["pieces"]
    part = pieces["layer/factors/u"][5]
    assert (len(pieces["layer/factors/u"]), part["start"]) == (8, [20, 0])
    data = bytearray(file.with_suffix(".bin").read_bytes())
    data[part["offset"]] ^= 16
    file.with_suffix(".bin").write_bytes(data)
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    for target in (None, "8 by ranks", "2x4 joined", "2 replicated"):
        with pytest.raises(DamagedCheckpoint, match="array layer/factors/u: its check"):
            checkpoint.load(saved, abstract(target))


def test_what_was_restored_may_be_donated(tmp_path):
    """No two devices, and no later reader, share memory with it."""
    model = placed("2 replicated")
    checkpoint.save(tmp_path / "new", model)
    saved = checkpoint.open_checkpoint(tmp_path / "new")
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    template = checkpoint.model_items(abstract("2 replicated"))["params"]
    items = checkpoint.restore(saved, {"params": template})
    bumped = checkpoint.flatten(bump(items["params"]))
    for key, array in params_of(model).items():
        for shard in bumped[key].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array) + 1)
