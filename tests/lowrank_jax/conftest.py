"""What tests of layers share."""

from collections.abc import Iterator

import jax
import pytest
from foreign_models import Dense, Experts

from lowrank_jax.layers import LAYERS, register


@pytest.fixture
def registered() -> Iterator[None]:
    """Classes of the test's own are in the table while it runs; they broadcast as
    NumPy does, as others' code."""
    before = dict(LAYERS)
    register(Dense, kernel="weight", inputs=(1,), outputs=(0,))
    register(Experts, kernel="kernels", stack=(0,), inputs=(1,), outputs=(2,))
    with jax.numpy_rank_promotion("allow"):
        yield
    LAYERS.clear()
    LAYERS.update(before)
