"""BatchNorm re-estimation, against plain averages in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax.active import set_ranks
from lowrank_jax.calibration import (
    batch_norm_average,
    has_batch_norm,
    recalibrate_batch_norm,
    use_batch_statistics,
)
from lowrank_jax.factorization import factorize


class Net(nnx.Module):
    """Two normalized layers, with dropout between, and one norm that never runs."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(4, momentum=0.9, rngs=rngs) for _ in range(2)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, inputs):
        hidden = self.dropout(jnp.tanh(self.norms[0](self.first(inputs))))
        return self.norms[1](self.second(hidden))


@pytest.fixture
def net() -> Net:
    """A model in train mode, its running statistics far from any batch's own."""
    model = Net(nnx.Rngs(0))
    for norm in (*model.norms, model.unused):
        norm.mean.set_value(norm.mean[...] + 7)
        norm.var.set_value(norm.var[...] * 5)
    return model


BATCHES = [
    jnp.asarray(np.random.default_rng(n).normal(n, 1 + n, size=(8, 3)), jnp.float32)
    for n in range(3)
]


def numpy_statistics(model: Net, batches) -> list[tuple[np.ndarray, np.ndarray]]:
    """The average over batches of each layer's batch mean and (biased) variance.

    Each batch is normalized by its own statistics on the way, and nothing is dropped.
    """
    seen = [[], []]
    for batch in batches:
        hidden = np.asarray(batch, np.float64)
        layers = zip((model.first, model.second), model.norms, seen, strict=True)
        for layer, norm, into in layers:
            dense = layer if isinstance(layer, nnx.Linear) else layer.to_dense()
            hidden = hidden @ np.float64(dense.kernel[...]) + np.float64(
                dense.bias[...]
            )
            mean, variance = hidden.mean(0), hidden.var(0)
            into.append((mean, variance))
            hidden = np.tanh((hidden - mean) / np.sqrt(variance + norm.epsilon))
    return [
        tuple(np.mean(part, axis=0) for part in zip(*one, strict=True)) for one in seen
    ]


@pytest.mark.parametrize("number", [1, 3])
def test_statistics_are_the_plain_average_over_the_batches(net, number):
    """A cumulative average, whatever the momentum and the statistics before."""
    found = recalibrate_batch_norm(net, iter(BATCHES[:number]))
    expected = numpy_statistics(net, BATCHES[:number])
    for norm, (mean, variance) in zip(found.norms, expected, strict=True):
        assert relative_error(norm.mean[...], mean) <= 1e-5
        assert relative_error(norm.var[...], variance) <= 1e-5


def test_a_cut_model_gets_its_own_statistics(net):
    """Those of the activations at the active rank, through low-rank layers."""
    model = factorize(net)
    set_ranks(model, {"first": 1, "second": 0})
    found = recalibrate_batch_norm(model, BATCHES)
    expected = numpy_statistics(model, BATCHES)
    for norm, (mean, variance) in zip(found.norms, expected, strict=True):
        assert relative_error(norm.mean[...], mean) <= 1e-5
        np.testing.assert_allclose(norm.var[...], variance, rtol=1e-4, atol=1e-6)
    assert found.first.factors.rank[...] == 1
    full = numpy_statistics(net, BATCHES)
    assert relative_error(found.norms[0].mean[...], full[0][0]) > 1e-2


def test_nothing_else_changes(net):
    """The given model, and in the copy parameters, momentum, mode and random keys."""
    before = jax.tree.map(np.array, nnx.state(net, nnx.BatchStat))
    found = recalibrate_batch_norm(net, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net, nnx.BatchStat), before)
    assert nnx.graphdef(found) == nnx.graphdef(net)
    assert found.norms[0].momentum == 0.9 and not found.norms[0].use_running_average
    assert not found.dropout.deterministic
    others = nnx.Not(nnx.BatchStat)
    old, new = nnx.state(net, others), nnx.state(found, others)
    for leaf, same in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, same = jax.random.key_data(leaf), jax.random.key_data(same)
        np.testing.assert_array_equal(leaf, same)
    np.testing.assert_array_equal(found.unused.mean[...], net.unused.mean[...])
    np.testing.assert_array_equal(found.unused.var[...], net.unused.var[...])


def test_forward_says_how_to_run_the_model(net):
    """Batches may be anything that it understands."""
    batches = [{"image": batch, "label": None} for batch in BATCHES]
    found = recalibrate_batch_norm(net, batches, lambda m, batch: m(batch["image"]))
    expected = recalibrate_batch_norm(net, BATCHES)
    for one, other in zip(found.norms, expected.norms, strict=True):
        np.testing.assert_array_equal(one.mean[...], other.mean[...])


def test_a_model_without_batch_norm_comes_back_as_it_is():
    """And no batch is taken from the pipeline for it."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    batches = iter(BATCHES)
    assert recalibrate_batch_norm(model, batches) is model
    assert len(list(batches)) == 3


def test_no_batches_are_refused(net):
    """Averages over nothing would silently keep, or zero, the statistics."""
    with pytest.raises(ValueError, match="at least one batch, got none"):
        recalibrate_batch_norm(net, [])


def test_batch_statistics_are_used_and_kept(net):
    """Each batch is normalized by its own; the running ones become its own. Dropout,
    and a norm that does not run, stay as they are."""
    net.eval()
    control = nnx.clone(net)
    use_batch_statistics(net)
    assert net.dropout.deterministic
    for batch in BATCHES:
        outputs = net(batch)
        np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(outputs.std(0), 1, atol=1e-3)
        for norm, (mean, variance) in zip(
            net.norms, numpy_statistics(net, [batch]), strict=True
        ):
            assert relative_error(norm.mean[...], mean) <= 1e-5
            assert relative_error(norm.var[...], variance) <= 1e-5
    np.testing.assert_array_equal(net.unused.mean[...], control.unused.mean[...])
    assert np.abs(control(BATCHES[0]).mean(0)).max() > 1  # the running ones are far off


def test_batch_norm_is_found_wherever_it_is(net):
    """In a list, inside another model; other norms and layers are none."""
    assert has_batch_norm(net) and has_batch_norm(nnx.Sequential(net))
    rngs = nnx.Rngs(0)
    assert not has_batch_norm(
        nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.LayerNorm(2, rngs=rngs))
    )


def test_the_step_serves_any_ranks_in_one_trace(net):
    """Each rank's own average from one compiled step, whatever the statistics before;
    the model that is given stays, and so does what dropout would draw."""
    model, traces = factorize(net), []
    graphdef, start, rest = nnx.split(model, nnx.BatchStat, ...)

    @jax.jit
    def step(means, count, ranks, batch):
        traces.append(1)
        current = nnx.merge(graphdef, means, rest, copy=True)
        set_ranks(current, ranks)
        before = jax.tree.leaves(nnx.state(current))
        found = batch_norm_average(current, count, lambda m: m(batch))
        after = jax.tree.leaves(nnx.state(current))
        assert all(x is y for x, y in zip(before, after, strict=True))
        return found

    for rank in (3, 1):
        ranks, means = {"first": jnp.int32(rank), "second": jnp.int32(1)}, start
        for number, batch in enumerate(BATCHES, 1):
            means = step(means, jnp.float32(number), ranks, batch)
        found = nnx.clone(model)
        set_ranks(found, {"first": rank, "second": 1})
        expected = numpy_statistics(found, BATCHES)
        nnx.update(found, means)
        for norm, (mean, variance) in zip(found.norms, expected, strict=True):
            assert relative_error(norm.mean[...], mean) <= 1e-5
            np.testing.assert_allclose(norm.var[...], variance, rtol=1e-4, atol=1e-6)
    assert len(traces) == 1
