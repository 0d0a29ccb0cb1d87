"""What XLA fuses on CPUs: products in a row, computed wrongly by jax before 0.12."""

import json
import os
import subprocess
import sys

import jax
import pytest

from train import xla_flags

BEFORE_THE_MEND = jax.__version_info__ < (0, 12)
PROGRAM = """
import json
import sys
import jax
import numpy as np
from flax import nnx
from lowrank_jax import factorize
from train import xla_flags

if "flags" in sys.argv:
    xla_flags.leave_products_apart()

def centred(x):
    return x - x.mean(axis=-1, keepdims=True)

def error(function, *arrays):
    expected = function(*arrays)
    return float(abs(jax.jit(function)(*arrays) - expected).max())

def draw(*shape):
    values = np.random.default_rng(0).normal(size=shape) / np.sqrt(shape[0])
    return jax.numpy.asarray(values, np.float32)

x, up, u, v = draw(32, 128, 128), draw(128, 512), draw(512, 128), draw(128, 128)
layer = factorize(nnx.Linear(512, 128, rngs=nnx.Rngs(0)))
graph, state = nnx.split(layer)
print(json.dumps({
    "plain": error(lambda x, up, u, v: centred((x @ up) @ (u @ v)), x, up, u, v),
    "layer": error(
        lambda x, up, state: centred(nnx.merge(graph, state)(x @ up)), x, up, state
    ),
}))
"""


def errors(*arguments: str) -> dict[str, float]:
    """How far compiled functions are off, in a process with XLA's own defaults."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA's on CPUs")
def test_merged_layers_are_right_whatever_xla_fuses():
    found = errors()
    assert found["layer"] < 1e-4
    if BEFORE_THE_MEND:  # else the layer would show nothing
        assert found["plain"] > 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA's on CPUs")
def test_with_the_flag_every_product_is_right():
    assert max(errors("flags").values()) < 1e-4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"{xla_flags.FUSION}="),
        ("--xla_a=1", f"--xla_a=1 {xla_flags.FUSION}="),
        (f"{xla_flags.FUSION}=X", f"{xla_flags.FUSION}=X"),
    ],
)
@pytest.mark.skipif(not BEFORE_THE_MEND, reason="jax 0.12 needs no flag")
def test_the_environment_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
):
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    xla_flags.leave_products_apart()
    assert os.environ["XLA_FLAGS"] == after
