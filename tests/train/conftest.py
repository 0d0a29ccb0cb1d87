"""Runs that several files of tests read: each is trained once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from cutting import FULL, make_config

from lowrank_jax import checkpoint
from train import loop


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """An MLP of ranks `FULL`, big enough for its factors to be saved in chunks."""
    workdir = tmp_path_factory.mktemp("mlp") / "run"
    config = make_config("mlp", {"hidden": (80,)}, epochs=3)
    loop.train_and_evaluate(config, workdir)
    assert checkpoint.open_checkpoint(workdir).metadata["ranks"] == FULL
    return workdir


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[disks.SmallDisk]:
    """A disk of one megabyte."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(disks.small_disk(tmp_path / "disk"))
        except disks.NoDisk as reason:
            pytest.skip(f"no small disk can be mounted: {reason}")
        yield disk
