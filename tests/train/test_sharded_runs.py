"""The same run on one device and on many: losses, ranks, parameters, figures.

The run does all there is to do (tests/faults/config.py): ordered dropout, a lasso,
shrinking, two actions between the phases, a search at the end. Devices sum in another
order, so numbers differ by rounding, and no rank by one.
"""

from pathlib import Path

import pytest
import support
from sharded import assert_same_run, short_run

from train import loop

MESHES = {
    "data": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "tensor": {"data": 1, "fsdp": 1, "tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("one") / "run"
    loop.train_and_evaluate(short_run(), workdir)
    return workdir


class TestMeshes:
    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", MESHES)
    def test_a_run_is_the_same(self, one_device, tmp_path, mesh):
        with support.all_devices():
            loop.train_and_evaluate(short_run(mesh=MESHES[mesh]), tmp_path / "run")
        assert_same_run(tmp_path / "run", one_device)

    @pytest.mark.slow
    def test_a_run_goes_on_with_other_devices(self, one_device, tmp_path):
        """On one device until step 3, then on eight, split over all axes."""
        support.interrupt(short_run(), tmp_path / "run", 3)
        with support.all_devices():
            mesh = MESHES["all"]
            loop.train_and_evaluate(short_run(mesh=mesh), tmp_path / "run")
        assert_same_run(tmp_path / "run", one_device)


class TestSizes:
    @pytest.mark.slow
    def test_cut_passes_on_parts_of_a_batch(self, tmp_path):
        """Sizes that are drawn, each on its own half, any ranks below them."""
        config = short_run()
        drawn = {"fractions": ((0.5, 0.25), (0.125,)), "between": "layers"}
        sampler = {"name": "strata", "args": drawn}
        first, second = config["phases"]
        second |= {"sampler": sampler, "sizes": "static", "pass_parts": 2}
        config["phases"] = (first, second)
        loop.train_and_evaluate(config, tmp_path / "one")
        with support.all_devices():
            mesh = MESHES["all"]
            loop.train_and_evaluate(config | {"mesh": mesh}, tmp_path / "all")
        assert_same_run(tmp_path / "all", tmp_path / "one")


class TestAccumulation:
    @pytest.mark.slow
    def test_parts_of_a_batch_add_up(self, one_device, tmp_path):
        """The same gradients, without anything that draws or normalizes per part."""
        loop.train_and_evaluate(short_run(accumulation_steps=3), tmp_path / "run")
        assert_same_run(tmp_path / "run", one_device)

    @pytest.mark.slow
    def test_on_many_devices(self, one_device, tmp_path):
        config = short_run(accumulation_steps=3, mesh=MESHES["all"])
        with support.all_devices():
            loop.train_and_evaluate(config, tmp_path / "run")
        assert_same_run(tmp_path / "run", one_device)
