"""What a step computes in bfloat16, and what it does not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from loop_configs import make_config, phase

from configs import common
from lowrank_jax import factorize
from train import checks, computing, phases
from train.config import to_json
from train.run import open_run
from train.state import new_state
from train.step import make_train_step

DTYPES = ("float32", "bfloat16")
MODELS = [
    "mlp",
    pytest.param("convnet", marks=pytest.mark.slow),
    pytest.param("vit", marks=pytest.mark.slow),
]
NESTED = {
    "sampler": common.named("sandwich", passes=3),
    "teacher": common.named("full", target_weight=0.5),
}


def make_step(model: str, dtype: str, **changes):
    """The step of a model on digits, its first state, and a batch."""
    config = make_config(phase(4, **changes), model=model, compute_dtype=dtype)
    run = open_run(to_json(config))
    (spec,) = phases.build_phases(run.config["phases"])
    running = spec.begin(0, 4)
    structure, state = new_state(run.fresh_model(), running, 0)
    key = jax.random.key(0)
    step = make_train_step(structure, running, run.task, key, compute_dtype=dtype)
    return step, state, next(run.data.train_batches(65, seed=0))


@pytest.mark.parametrize("model", MODELS)
def test_a_step_in_bfloat16_is_near_that_in_float32(model):
    """As near as eight bits are; the state keeps its dtypes."""
    results = []
    for dtype in DTYPES:
        step, state, batch = make_step(model, dtype, **NESTED)
        kinds = jax.tree.map(lambda x: x.dtype, state)
        state, metrics = step(state, batch)
        assert jax.tree.map(lambda x: x.dtype, state) == kinds
        results.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    (loss, norm), (loss_16, norm_16) = results
    assert loss_16 == pytest.approx(loss, rel=0.02)
    assert norm_16 == pytest.approx(norm, rel=0.1)
    assert loss_16 != loss


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_of_this_dtype(model, dtype):
    """All that have a weight; what normalization sums has none."""
    step, state, batch = make_step(model, dtype)
    lines = step.lower(state, batch).as_text().splitlines()
    products = [x for x in lines if "dot_general" in x or "stablehlo.convolution" in x]
    kinds = {kind for line in products for kind in re.findall(r"x(b?f\d+)>", line)}
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert short in kinds
    assert kinds <= {short, "f32"}
    if model == "mlp":
        assert kinds == {short}


def test_a_layer_keeps_the_dtype_that_it_was_given():
    layers = nnx.List(
        [
            nnx.Linear(2, 2, dtype=jnp.float32, rngs=nnx.Rngs(0)),
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            factorize(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
            nnx.LayerNorm(2, rngs=nnx.Rngs(0)),
        ]
    )
    computing.prepare(layers, "bfloat16", one_device=True)
    assert [layer.dtype for layer in layers] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
        None,
    ]


def test_a_low_rank_layer_multiplies_in_its_dtype():
    """Against its product in float64, rounded once more."""
    layer = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    inputs = np.random.default_rng(0).normal(size=(3, 8))
    wanted = inputs @ np.asarray(layer.factors.matrix(), np.float64)
    computing.prepare(layer, "bfloat16", one_device=True)
    found = layer(jnp.asarray(inputs, jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05)


def test_the_check_before_the_first_step_traces_it():
    config = make_config(phase(4, **NESTED), compute_dtype="bfloat16")
    run = open_run(to_json(config))
    plan = phases.build_phases(run.config["phases"])
    checks.check_phases(run, plan, run.fresh_model())
