"""Where arrays lie on a mesh, and what a compiled step holds and sends there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx
from jax.sharding import PartitionSpec
from loop_configs import make_config, phase

from configs import common
from lowrank_jax import factorization
from lowrank_jax.errors import UserError
from train import sharding
from train.config import to_json
from train.run import open_run
from train.state import new_state
from train.step import make_train_step

SPLIT = ("fsdp", "tensor")


def placement(data: int, fsdp: int, tensor: int) -> sharding.Placement:
    with support.all_devices():
        return sharding.make_placement({"data": data, "fsdp": fsdp, "tensor": tensor})


class Net(nnx.Module):
    """A convolution, a factored layer, a dense one, and a parameter with names."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)
        named_axes = {"out_sharding": ("out", None), "eager_sharding": False}
        self.scale = nnx.Param(jnp.ones((8, 3)), **named_axes)


class TestTable:
    def test_every_parameter_has_its_axes(self):
        model = factorization.factorize(Net(), [("hidden", "full"), (".*", "dense")])
        assert placement(2, 2, 2).layout(model).specs == {
            "conv/kernel": PartitionSpec(None, None, None, "tensor"),  # 3 divides not
            "conv/bias": PartitionSpec("tensor"),
            "hidden/factors/u": PartitionSpec(SPLIT, None),
            "hidden/factors/v": PartitionSpec(None, SPLIT),
            "hidden/bias": PartitionSpec("tensor"),
            "head/kernel": PartitionSpec("fsdp", None),
            "head/bias": PartitionSpec(None),
            "scale": PartitionSpec(SPLIT, None),
        }

    def test_an_axis_that_does_not_divide_stays_whole(self):
        place = placement(2, 2, 2)
        struct = jax.ShapeDtypeStruct
        spec = (SPLIT, SPLIT)
        assert place.fitting(spec, struct((6, 5), "float32")) == PartitionSpec(
            "fsdp", None
        )
        assert place.fitting(spec, struct((0, 8), "float32")) == PartitionSpec(
            None, SPLIT
        )
        assert place.fitting(spec, struct((8,), "float32")) == PartitionSpec()

    def test_moments_lie_as_their_parameters(self):
        model = factorization.factorize(Net(), [("hidden", "full"), (".*", "dense")])
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        layout = placement(2, 2, 2).layout(model)
        state = {"0": {"mu": params, "count": jnp.zeros(())}}
        placed = layout.put(state)["0"]
        assert placed["count"].sharding.spec == PartitionSpec()
        moments, params = (
            jax.tree.leaves(placed["mu"]),
            jax.tree.leaves(layout.put(params)),
        )
        assert [x.sharding for x in moments] == [x.sharding for x in params]

    @pytest.mark.parametrize(
        "mesh, shape",
        [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, 8), (1, 1, 8))],
    )
    def test_minus_one_is_what_is_left(self, mesh, shape):
        assert tuple(placement(*mesh).mesh.shape.values()) == shape

    @pytest.mark.parametrize(
        "mesh", [(2, 2, 1), (3, -1, 1), (-1, -1, 1), (16, 1, 1), (0, -1, 1), (-2, 2, 2)]
    )
    def test_a_mesh_of_another_size_is_refused(self, mesh):
        with pytest.raises(UserError, match=r"config.mesh: must multiply to the 8"):
            placement(*mesh)

    def test_a_checkpoint_of_more_devices_is_judged_on_these(self):
        with support.all_devices():
            mesh = sharding.any_devices({"data": 16, "fsdp": 4, "tensor": 1}).mesh
        assert tuple(mesh.shape.values()) == (8, 1, 1)

    @pytest.mark.parametrize("changes", [{"batch_size": 60}, {"parts": 2}])
    def test_a_batch_that_does_not_divide_is_refused(self, changes):
        config = make_config(phase(1))
        config["data"]["batch_size"] = changes.get("batch_size", 72)
        config["accumulation_steps"] = changes.get("parts", 1)
        with (
            support.all_devices(),
            pytest.raises(UserError, match="batch_size: must be a multiple of"),
        ):
            open_run(to_json(config))


class Grouped(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
        return self.conv(inputs)


class TestGroupedConvolutions:
    def test_they_are_refused_where_their_gradient_would_be_wrong(self):
        with pytest.raises(
            UserError, match=r"tensor must be 1 .* got 2 and \['conv'\]"
        ):
            placement(2, 2, 2).check(Grouped())

    def test_so_are_those_whose_input_is_dilated(self):
        rngs = nnx.Rngs(0)
        dilated = nnx.Sequential(
            nnx.Conv(4, 4, (3,), rngs=rngs),
            nnx.Conv(4, 4, (3,), input_dilation=2, padding=1, rngs=rngs),
            nnx.ConvTranspose(4, 4, (3,), rngs=rngs),
        )
        for model in (dilated, factorization.factorize(dilated)):
            with pytest.raises(
                UserError, match=r"got 2 and \['layers/1', 'layers/2'\]"
            ):
                placement(2, 2, 2).check(model)
            placement(2, 4, 1).check(model)

    @pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1)])
    def test_a_batch_over_all_axes_is_fine(self, mesh):
        """Against the same gradient on one device."""
        place, model = placement(*mesh), Grouped()
        place.check(model)
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(8, 5, 4)).astype(np.float32)

        def gradient(model: nnx.Module, inputs: Any) -> Any:
            return nnx.grad(lambda model: jnp.square(model(inputs)).sum())(model)

        one = gradient(model, inputs)
        many = nnx.jit(gradient)(
            place.put_model(model), place.batch({"x": inputs}, 8)["x"]
        )
        for actual, expected in zip(*map(jax.tree.leaves, (many, one)), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


class TestBatches:
    def test_rows_are_whole_where_one_process_has_all(self):
        np.testing.assert_array_equal(placement(2, 2, 2).rows(24), np.arange(24))

    def test_devices_in_any_order_get_their_rows(self):
        """As on a slice of TPUs, whose grid does not follow the processes."""
        place = placement(8, 1, 1)
        order = [3, 0, 7, 1, 2, 6, 5, 4]
        devices = place.mesh.devices.reshape(8)[order].reshape(8, 1, 1)
        place = sharding.Placement(jax.sharding.Mesh(devices, place.mesh.axis_names))
        rows = np.arange(16)
        batch = place.batch({"row": rows}, 16)["row"]
        np.testing.assert_array_equal(batch, rows)
        first = next(s for s in batch.addressable_shards if s.device.id == order[0])
        np.testing.assert_array_equal(first.data, [0, 1])

    def test_what_does_not_divide_lies_whole_on_every_device(self):
        batch = placement(8, 1, 1).batch({"row": np.arange(5)}, 5)["row"]
        assert batch.is_fully_replicated
        np.testing.assert_array_equal(batch, np.arange(5))

    def test_a_batch_is_split_over_data_and_fsdp(self):
        rows = {"image": np.arange(24.0).reshape(8, 3)}
        batch = placement(2, 2, 2).batch(rows, 8)["image"]
        np.testing.assert_array_equal(batch, rows["image"])
        assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def step_of(mesh: dict[str, int], *, width: int, **changes: Any):
    """A compiled training step of an MLP on this mesh."""
    spec = phase(10, optimizer=common.optimizer("adam", learning_rate=1e-3), **changes)
    config = make_config(
        spec, rank_rules=[["head", "dense"], [".*", {"max_rank": width // 4}]]
    )
    config["model"] = {"name": "mlp", "args": {"hidden": [width, width, width]}}
    config["data"]["batch_size"], config["mesh"] = 64, mesh
    with support.all_devices():
        run = open_run(to_json(config))
        model = run.fresh_model()
        running = support.begin(config["phases"][0])
        structure, state = new_state(model, running, 0)
        layout = run.placement.layout(model)
        step = make_train_step(
            structure, running, run.task, jax.random.key(0), layout=layout
        )
        batch = next(run.batches_from(0))
        return step.lower(layout.put(state), batch).compile(), state


def mesh_of(**sizes: int) -> dict[str, int]:
    return {"data": -1, "fsdp": 1, "tensor": 1, **sizes}


class TestMemory:
    @pytest.mark.slow
    def test_the_state_of_a_device_falls_with_fsdp(self):
        """Bytes that a device holds before the step, by the compiler's own account."""
        held = {}
        for fsdp in (1, 2, 8):
            compiled, state = step_of(mesh_of(fsdp=fsdp), width=256)
            held[fsdp] = compiled.memory_analysis().argument_size_in_bytes
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        assert held[1] == pytest.approx(whole, rel=0.02)
        for fsdp in (2, 8):
            assert held[fsdp] == pytest.approx(whole / fsdp, rel=0.1), held
