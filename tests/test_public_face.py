"""What `import lowrank_jax as lr` gives, used as the README does."""

import importlib.metadata
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_jax as lr

FUNCTIONS = (
    "at_ranks",
    "canonicalize",
    "count",
    "factorize",
    "find_factors",
    "get_ranks",
    "max_ranks",
    "merge",
    "ranks_for",
    "set_ranks",
    "shrink",
    "summary",
    "tail_ranks",
    "truncate",
)
MODULES = (
    "calibration",
    "checkpoint",
    "errors",
    "layers",
    "penalties",
    "projections",
    "samplers",
    "selection",
)
STEPS = 5


class MyModel(nnx.Module):
    """Somebody's model."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(6, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.fixture
def data() -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(0).normal(size=(32, 6))
    return jnp.asarray(x, jnp.float32), jnp.asarray(x[:, :4].argmax(axis=1))


def test_documented_names_are_there():
    """As attributes after one import, and in `__all__`, each with a docstring."""
    for name in FUNCTIONS:
        assert callable(getattr(lr, name)) and getattr(lr, name).__doc__
    for name in MODULES:
        assert isinstance(getattr(lr, name), types.ModuleType)
    types_ = {"Elastic", "Factors", "Rank", "UserError"}
    assert {*FUNCTIONS, *MODULES, *types_} <= set(lr.__all__)
    assert all(hasattr(lr, name) for name in lr.__all__)
    assert issubclass(lr.UserError, ValueError)


def test_tables_can_be_reached():
    """Every row by its name in its module."""
    for module, table in (
        (lr.samplers, lr.samplers.SAMPLERS),
        (lr.penalties, lr.penalties.PENALTIES),
        (lr.projections, lr.projections.PROJECTIONS),
    ):
        assert table and all(callable(getattr(module, name)) for name in table)
    assert "params_fraction" in lr.selection.SELECTORS
    assert nnx.Linear in lr.layers.LAYERS


def test_train_once_and_cut_at_any_rank(data):
    """The README's first example: sampled ranks leave one trace, and no trace in the
    model; what is cut for a budget keeps it, and computes what the model does."""
    x, y = data
    traces = []

    model = lr.factorize(MyModel(rngs=nnx.Rngs(0)))
    sampler = lr.samplers.single_layer()
    lasso = lr.penalties.hierarchical_group_lasso(weight=1e-3)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    state = sampler.init(model)

    @nnx.jit
    def step(model, optimizer, ranks, x, y):
        traces.append(1)

        def loss(model):
            with lr.at_ranks(model, ranks):
                logits = model(x)
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return ce + lasso(model)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    before, drawn, losses = lr.get_ranks(model), [], []
    for number, key in enumerate(jax.random.split(jax.random.key(0), STEPS)):
        ranks, state = sampler.sample(state, key, number)
        drawn.append({path: int(rank) for path, rank in ranks.items()})
        losses.append(float(step(model, optimizer, ranks, x, y)))
        assert lr.get_ranks(model) == before == lr.max_ranks(model)

    assert len(traces) == 1 and len({str(ranks) for ranks in drawn}) > 1
    assert np.isfinite(losses).all() and len(set(losses)) == STEPS

    small_ranks = lr.ranks_for(model, params_fraction=0.5)
    small = lr.truncate(model, small_ranks)
    assert lr.get_ranks(small) == lr.max_ranks(small) == small_ranks != before
    cost = lr.count(model, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    factored = cost.params(small_ranks) - cost.fixed_params
    assert factored <= 0.5 * (cost.dense_params - cost.fixed_params)
    with lr.at_ranks(model, small_ranks):
        expected = model(x)
    np.testing.assert_allclose(small(x), expected, atol=1e-5)
    dense = lr.merge(small)
    assert type(dense.up) is nnx.Linear
    np.testing.assert_allclose(dense(x), expected, atol=1e-5)


def test_the_functional_loop_takes_the_same_steps(data):
    """The README's second example: pure functions of parameters, without NNX's cost for
    each leaf."""
    x, y = data
    sampler = lr.samplers.single_layer()
    lasso = lr.penalties.hierarchical_group_lasso(weight=1e-3)
    transform = optax.sgd(0.1)

    def loss(model, ranks):
        with lr.at_ranks(model, ranks):
            logits = model(x)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return ce + lasso(model)

    @nnx.jit
    def nnx_step(model, optimizer, ranks):
        optimizer.update(model, nnx.grad(lambda model: loss(model, ranks))(model))

    functional = lr.factorize(MyModel(rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(functional, nnx.Param, ...)
    opt_state = transform.init(params)

    @jax.jit
    def pure_step(params, opt_state, ranks):
        def loss_of(params):
            return loss(nnx.merge(graphdef, params, rest, copy=True), ranks)

        updates, opt_state = transform.update(jax.grad(loss_of)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    model = lr.factorize(MyModel(rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    state = sampler.init(model)
    for number, key in enumerate(jax.random.split(jax.random.key(0), STEPS)):
        ranks, state = sampler.sample(state, key, number)
        nnx_step(model, optimizer, ranks)
        params, opt_state = pure_step(params, opt_state, ranks)
    nnx.update(functional, params)
    np.testing.assert_allclose(functional(x), model(x), atol=1e-5)
    assert lr.get_ranks(functional) == lr.get_ranks(model) == lr.max_ranks(model)


def test_a_save_needs_no_installed_distribution(tmp_path, monkeypatch):
    """In a checkout that was never installed, the package itself says its version."""
    found = importlib.metadata.Distribution.from_name

    def absent(name: str) -> importlib.metadata.Distribution:
        if name.replace("-", "_") == "lowrank_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", absent)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("lowrank_jax")
    model = lr.factorize(MyModel(rngs=nnx.Rngs(0)))
    lr.checkpoint.save(tmp_path / "saved", model)
    saved = lr.checkpoint.open_checkpoint(tmp_path / "saved")
    assert saved.metadata["library_version"] == lr.__version__
