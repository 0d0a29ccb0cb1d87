"""What cuts lose of outputs, against NumPy in float64, and what it is for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import check_form

from lowrank_jax import canonicalize, factorize
from lowrank_jax.active import get_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Rank
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import flatten_rank
from lowrank_jax.selection import activations, choosing, curves, tails
from lowrank_jax.selection.selectors import SELECTORS

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def with_arrays(model: nnx.Module, path: str, **arrays: np.ndarray) -> nnx.Module:
    """Sets factors of a layer; ordered dropout leaves no singular vectors either."""
    for name, array in arrays.items():
        getattr(find_factors(model)[path], name).set_value(jnp.asarray(array))
    return model


def quadratic(u: np.ndarray, v: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """tr(v_tail^T C_tail v_tail) of the hidden's second moment C, as a share, made
    falling; in float64."""
    hidden = np.float64(rows) @ np.float64(u)
    moment, v = hidden.T @ hidden / len(rows), np.float64(v)
    rank = len(v)
    lost = [
        np.trace(v[kept:].T @ moment[kept:, kept:] @ v[kept:])
        for kept in range(rank + 1)
    ]
    return np.maximum.accumulate(lost[::-1])[::-1] / lost[0]


def test_a_linear_layer_by_numpy():
    """Over two batches, with a bias, inputs that are far from white, and factors whose
    columns are not orthogonal: the cross terms count."""
    model = factorize(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    u, v = normal(6, 5), normal(5, 5)
    with_arrays(model, "", u=u, v=v)
    model.bias.set_value(jnp.asarray(100 * normal(5)))
    batches = [normal(40, 6) @ normal(6, 6) for _ in range(2)]
    (found,) = activations.output_losses(model, map(jnp.asarray, batches))[""]
    expected = quadratic(u, v, np.concatenate(batches))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    columns = np.square(np.linalg.norm(np.concatenate(batches) @ u, axis=0))
    alone = columns * np.square(np.linalg.norm(v, axis=1))
    without = np.cumsum(alone[::-1])[::-1] / alone.sum()
    assert np.abs(found[:-1] - without).max() > 0.05  # sums of columns are not it
    assert get_ranks(model) == {"": 5}


def test_a_convolution_by_numpy():
    """Its rows are the patches of the image, taken by hand."""
    model = factorize(nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0)))
    u, v = normal(18, 4), normal(4, 4)
    with_arrays(model, "", u=u, v=v)
    images = np.cumsum(normal(3, 6, 5, 2), axis=1)  # pixels beside others are alike
    patches = [
        images[n, x : x + 3, y : y + 3].reshape(-1)
        for n, x, y in itertools.product(range(3), range(4), range(3))
    ]
    (found,) = activations.output_losses(model, [jnp.asarray(images)])[""]
    expected = quadratic(u, v, np.stack(patches))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_case_by_hand():
    """W = diag(1, 2), inputs (3, 0) and (0, 1): the squares 9 and 4; a column that is
    taken back by the next loses more with the next than by itself."""
    model = factorize(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))
    inputs = jnp.asarray([[3.0, 0.0], [0.0, 1.0]])
    with_arrays(model, "", u=np.eye(2, dtype=np.float32), v=np.diag([1.0, 2.0]))
    measure = functools.partial(activations.output_losses, model, [inputs])
    np.testing.assert_allclose(measure()[""][0], [1, 4 / 13, 0], rtol=1e-6)
    # rows (3, 3) of h, v rows 1 and -2: whole 9, without the first column 36
    with_arrays(model, "", u=np.array([[1.0, 1.0], [0, 0]]), v=[[1.0, 0], [-2.0, 0]])
    np.testing.assert_allclose(measure()[""][0], [4, 4, 0], rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_orthogonal_changes_of_the_inputs_change_nothing(bias):
    """With the weights changed back; nor do those of the outputs."""
    model = factorize(nnx.Linear(6, 5, use_bias=bias, rngs=nnx.Rngs(0)))
    u, v, inputs = normal(6, 5), normal(5, 5), normal(50, 6) @ normal(6, 6)
    left, right = (np.linalg.qr(normal(n, n))[0] for n in (6, 5))
    found = [
        activations.output_losses(
            with_arrays(model, "", u=turned, v=out), [jnp.asarray(given)]
        )[""][0]
        for turned, out, given in (
            (u, v, inputs),
            (left.T @ u, v, inputs @ left),
            (u, v @ right, inputs),
            (u, v, 1e3 * inputs),
        )
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-5)


def test_white_inputs_leave_the_energy_of_the_weights():
    """Of canonical factors, at every rank up to 8 and at every rung above; and so does
    a Param that is never called."""

    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(24, 30, rngs=nnx.Rngs(0))
            self.param = nnx.Param(jnp.asarray(normal(30, 7)))

        def __call__(self, inputs):
            return self.layer(inputs) @ self.param[...]

    model = factorize(Net(), [("param", {"param": True}), (".*", "full")])
    model = canonicalize(model)
    white = jnp.asarray(np.linalg.qr(normal(200, 24))[0])
    found = activations.output_losses(model, [white])
    importances = curves.column_importances(find_factors(model))
    expected = tails.list_errors(importances, get_ranks(model), "energy")
    measured = [*range(9), 10, 12, 14, 16, 20, 24]
    np.testing.assert_allclose(
        found["layer"][0][measured],
        expected["layer"][0][measured],
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_array_equal(found["param"], expected["param"])


class Several(nnx.Module):
    """A stack that is scanned, layers that share factors, an embedding that is attended
    to, a grouped convolution, a subclass with its own forward, several matrices."""

    def __init__(self, rngs: nnx.Rngs):
        class Doubled(nnx.Linear):
            def __call__(self, inputs: jax.Array) -> jax.Array:
                return super().__call__(2 * inputs)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, rngs=rngs)

        self.embed = nnx.Embed(9, 6, rngs=rngs)
        self.blocks = stack(rngs.split(3))
        self.groups = nnx.Conv(6, 6, (3,), feature_group_count=2, rngs=rngs)
        self.own = Doubled(6, 6, rngs=rngs)
        self.heads = nnx.LinearGeneral((6,), (2, 3), rngs=rngs)
        self.again = self.own

    def __call__(self, tokens: jax.Array) -> jax.Array:
        axes = nnx.StateAxes({(nnx.Param, Rank): 0, ...: None})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(block: nnx.Linear, hidden: jax.Array) -> jax.Array:
            return nnx.relu(block(hidden))

        hidden = self.groups(run(self.blocks, self.embed(tokens)))
        hidden = self.again(nnx.relu(self.own(hidden)))
        hidden = self.heads(hidden).reshape(*hidden.shape)
        return self.embed.attend(hidden)


def test_layers_of_every_kind_are_measured_by_their_own_forward():
    """Each at a rank of its own, against cuts of one matrix at a time; at whole ranks
    what is lost is the share that the layer's outputs themselves say."""
    model = factorize(Several(nnx.Rngs(0)))
    set_ranks(model, {"blocks": [2, 5, 6], "groups": [3, 2], "heads": 4})
    tokens = jnp.asarray(RNG.integers(0, 9, (4, 7)))
    found = activations.output_losses(model, [tokens])
    ranks = get_ranks(model)
    assert found.keys() == ranks.keys()
    for path, rank in ranks.items():
        lengths = [active + 1 for active in flatten_rank(rank)]
        assert [len(curve) for curve in found[path]] == lengths
        for curve in found[path]:
            assert curve[0] > 0.99 and curve[-1] == 0
            assert np.all(np.diff(curve) <= 0) and len(set(curve)) == len(curve)
    # The second block, on what the first makes of the embedding.
    u, v = (np.asarray(getattr(model.blocks.factors, name)[...]) for name in "uv")
    bias = np.asarray(model.blocks.bias[...])
    inputs = np.asarray(model.embed(tokens)).reshape(-1, 6)
    inputs = np.maximum(inputs @ u[0, :, :2] @ v[0, :2] + bias[0], 0)
    expected = quadratic(u[1, :, :5], v[1, :5], inputs)
    np.testing.assert_allclose(found["blocks"][1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("selector", ["knapsack", "lc"])
def test_ranks_go_where_the_inputs_are(selector):
    """Control: two equal layers in all but their inputs, of which those of the one or
    the other lie in two directions. The weights say the same for both, the outputs say
    to keep two columns there, and what the model computes is nearer to the whole."""

    class Two(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, inputs: jax.Array) -> jax.Array:
            return jnp.stack([self.first(inputs[0]), self.second(inputs[1])])

    model = factorize(Two())
    leading, _ = np.linalg.qr(np.asarray(model.first.factors.u[...])[:, :2])
    budget = {"measure": "params", "fraction": 0.75}
    chosen, lost = {}, {"energy": 0.0, "activations": 0.0}
    for narrow, curve in itertools.product(("first", "second"), lost):
        inputs = [normal(64, 2) @ leading.T, normal(64, 8)]
        inputs = jnp.asarray(inputs if narrow == "first" else inputs[::-1])
        measure = functools.partial(activations.output_losses, model, [inputs])
        context = choosing.context_of(model, count(model, inputs))
        context = context._replace(activations=measure)
        ranks = choosing.choose(
            SELECTORS[selector].function, context, {**budget, "curve": curve}
        )
        chosen[narrow, curve] = ranks
        cut, whole = nnx.clone(model), model(inputs)
        set_ranks(cut, ranks)
        lost[curve] += float(jnp.sum((cut(inputs) - whole) ** 2) / jnp.sum(whole**2))
    assert chosen["first", "energy"] == chosen["second", "energy"]
    assert chosen["first", "activations"]["first"] == 2
    assert chosen["second", "activations"]["second"] == 2
    assert lost["activations"] < 0.1 * lost["energy"]


class Broken(nnx.Module):
    """Two layers, in the order of their names or against it; the path of one may be
    cut off."""

    def __init__(self, *, stops: bool):
        self.late = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.early = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        self.stops = stops

    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = self.late(inputs)  # runs first
        return self.early(jax.lax.stop_gradient(hidden) if self.stops else hidden)


def test_mistakes_are_named():
    """The first layer that sees NaN, not those behind it; a layer without a derivative;
    no batch; a rank per example; no data for the selector."""
    model, inputs = factorize(Broken(stops=False)), jnp.ones((3, 4))
    none = choosing.context_of(model, count(model, inputs))
    knapsack = SELECTORS["knapsack"].function
    args = {"measure": "params", "fraction": 0.9, "curve": "activations"}
    per_example = nnx.clone(model)
    set_ranks(per_example, {"late": jnp.asarray([1, 2, 3])})
    for refused, message in (
        (
            lambda: activations.output_losses(model, [inputs.at[0, 0].set(jnp.nan)]),
            "^late: activations must be finite",
        ),
        (
            lambda: activations.output_losses(
                factorize(Broken(stops=True)), [inputs, inputs]
            ),
            "^late: its outputs must reach those of the model by a derivative",
        ),
        (
            lambda: activations.output_losses(model, []),
            "^activations: batches must hold at least one batch, got none",
        ),
        (
            lambda: activations.output_losses(per_example, [inputs]),
            "^late: rank must be one number",
        ),
        (
            lambda: choosing.choose(knapsack, none, args),
            "^activations: must be there, from held-out training data, got none",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            refused()
        check_form(str(error.value))


def test_the_model_is_traced_once_for_all_ranks_and_batches():
    traced = []

    def forward(model: nnx.Module, batch: jax.Array) -> jax.Array:
        traced.append(batch.shape)
        return model(batch)

    model = factorize(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    batches = [jnp.asarray(normal(5, 16)) for _ in range(3)]
    activations.output_losses(model, batches, forward)
    assert len(traced) == 1
