"""What the penalties do to small trained models, each with a control that fails.

All runs are full batch, in one jitted scan, from the seeds and for the steps that each
test states. Measured figures are of float32 on CPU, the worst of seeds 0 to 2.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_jax import factorization, linalg, penalties, surgery
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import Penalty
from lowrank_jax.selection import spectral

SEEDS = (0, 1, 2)
Arrays = Mapping[str, jax.Array]


def minimize(
    objective: Callable, params, optimizer: optax.GradientTransformation, steps: int
):
    """The parameters after so many steps on `objective(params, step)`."""

    @jax.jit
    def run(params):
        def step(carry, number):
            params, state = carry
            grads = jax.grad(objective)(params, number)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]

    return run(params)


def cooled_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine schedule to 0, so that kinks at zero are reached, not
    circled."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def matrix_of(spectrum, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A matrix with these singular values and random singular vectors."""
    rng, size = np.random.default_rng(seed), len(spectrum)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, :size] for n in shape)
    return np.float32((left * np.asarray(spectrum)) @ right.T)


def merged(params: Arrays) -> jax.Array:
    u = params["u"]
    return (u * jnp.abs(params["s"])[None] if "s" in params else u) @ params["v"]


def spectrum(params: Arrays) -> np.ndarray:
    return np.linalg.svd(np.float64(merged(params)), compute_uv=False)


def fit_matrix(
    target: np.ndarray,
    params: Arrays,
    optimizer: optax.GradientTransformation,
    steps: int,
    *penalties: Penalty,
) -> Arrays:
    """Minimizes `1/2 ||W - target||_F^2` and the penalties over the factors of W."""

    def objective(params, step):
        loss = 0.5 * jnp.sum(jnp.square(merged(params) - target))
        model = Factors(**params)
        return loss + sum(penalty(model, step) for penalty in penalties)

    return minimize(objective, params, optimizer, steps)


def start(shape: tuple[int, int], rank: int, seed: int) -> Arrays:
    u, v = linalg.random_factors(jax.random.key(seed), *shape, rank, variance=0.1)
    return {"u": u, "v": v}


class Net(nnx.Module):
    """A regression net of two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, inputs):
        return self.second(jnp.tanh(self.first(inputs)))


def train_net(seed: int, *penalties: Penalty, steps: int = 500) -> tuple[Net, float]:
    """The net with scales, trained by Adam 1e-2 on a random function; and its loss.

    The function depends on the inputs through three directions only.
    """
    rng = np.random.default_rng(seed)
    inputs = np.float32(rng.normal(size=(64, 8)))
    targets = np.sin(inputs @ rng.normal(size=(8, 3))) @ rng.normal(size=(3, 4))
    targets = np.float32(targets)
    model = factorization.factorize(Net(nnx.Rngs(seed)), [(".*", {"with_s": True})])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(model):
        return jnp.mean(jnp.square(model(inputs) - targets))

    def objective(params, step):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return loss(model) + sum(penalty(model, step) for penalty in penalties)

    params = minimize(objective, nnx.as_pure(params), cooled_adam(1e-2, steps), steps)
    model = nnx.merge(graphdef, params, rest)
    return model, float(loss(model))


def defect(model: nnx.Module) -> float:
    """`||G - I||_F` of the worst factor, G its smaller Gram matrix."""
    found = []
    for factors in find_factors(model).values():
        u, _, v = factors.arrays()
        for side in (u, v):
            values = np.linalg.svd(np.float64(side), compute_uv=False)
            found.append(np.linalg.norm(values**2 - 1))
    return max(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_orthogonality_keeps_the_factors_orthonormal(seed):
    """u and v, orthonormal at the start, stay so; without the penalty they do not.

    The net of two layers, weight 10, 500 steps. Measured: ||G - I||_F of the worst
    factor 0.15, the control 7.3 at least.
    """
    kept, _ = train_net(seed, penalties.orthogonality(weight=10))
    control, _ = train_net(seed)
    assert defect(kept) <= 0.2
    assert defect(control) >= 2


def total_rank(model: nnx.Module, energy: float) -> int:
    factors = find_factors(surgery.canonicalize(model))
    spectra = {path: f.arrays()[1] for path, f in factors.items()}
    return sum(spectral.by_energy(spectra, energy).values())


@pytest.mark.parametrize("seed", SEEDS)
def test_hoyer_reaches_a_lower_rank(seed):
    """At equal removed energy, 0.1: at least three columns of twelve fewer.

    The net of two layers, both runs with orthogonality 1 (without it the scale moves
    from s into the factors), Hoyer's weight 0.2, 1,000 steps. Measured, seeds 0 to 2:
    6, 6 and 4 columns, the control 9, 9 and 10; the sparse net leaves 3 % of the
    targets' mean square at most.
    """
    keep = penalties.orthogonality(weight=1)
    sparse, loss = train_net(seed, keep, penalties.hoyer(weight=0.2), steps=1000)
    control, control_loss = train_net(seed, keep, steps=1000)
    assert total_rank(sparse, 0.9) <= total_rank(control, 0.9) - 3
    assert max(loss, control_loss) <= 0.1


TARGET = (4.0, 3.0, 2.0, 1.0, 0.5, 0.25)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("power", "weight"), [(1, 20.0), (2, 1e4)])
def test_modified_stable_rank_removes_the_tail(seed, power, weight):
    """Past the target rank below 1e-3 s_1, the head as it was: truncation is free.

    A linear net of two layers, 8x6 with singular values 4, 3, 2, 1, 1/2, 1/4 to learn,
    first without the penalty (Adam 0.02, 3,000 steps; the control), then with it at
    target rank 2, as long. The loss ends within 1 % of the best of any matrix of rank
    2, and the head within 1 %. Measured: s_3 7e-7 s_1 for power 1, 6.1e-4 s_1 for power
    2 (whose pull fades at zero, so it takes this weight); head within 0.04 %, loss at
    most the best one to six digits. The control is the whole spectrum.
    """
    target, params = matrix_of(TARGET, (8, 6), seed), start((8, 6), 6, seed)
    penalty = penalties.modified_stable_rank(
        weight=weight, target_ranks={"": 2}, power=power
    )
    adam = cooled_adam(0.02, 3000)
    control = fit_matrix(target, params, adam, 3000)
    np.testing.assert_allclose(spectrum(control), TARGET, atol=1e-3)
    low = fit_matrix(target, control, adam, 3000, penalty)
    values = spectrum(low)
    loss = 0.5 * np.sum(np.square(np.float64(merged(low)) - target))
    assert values[2] < 1e-3 * values[0]
    np.testing.assert_allclose(values[:2], TARGET[:2], rtol=0.01)
    assert loss <= 1.01 * 0.5 * np.sum(np.square(TARGET[2:]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", ["penalty", "optimizer"])
def test_weight_decay_on_two_factors_is_a_nuclear_norm(seed, decay):
    """LoRITa's principle with N = 2 (Zhang et al., 2024), against the closed form.

    Linear regression on orthonormal inputs, 1/2 ||X W - Y||_F^2, with decay 0.7 on both
    factors: the solution is the SVD of X^T Y with max(s - 0.7, 0) for singular values,
    within 1e-3. `nuclear` and decay in the optimizer do the same. 20 examples, 8x6, SGD
    0.1, 3,000 steps. Measured: 2e-7. Control: without decay the spectrum stays.
    """
    rng = np.random.default_rng(seed)
    inputs = np.float32(np.linalg.qr(rng.normal(size=(20, 8)))[0])
    target, params = matrix_of(TARGET, (8, 6), seed), start((8, 6), 6, seed)
    noise = np.float32(rng.normal(size=(20, 6)))
    outputs = inputs @ target + noise - inputs @ (inputs.T @ noise)
    penalty, optimizer = penalties.nuclear(weight=0.7), optax.sgd(0.1)
    if decay == "optimizer":
        penalty = penalties.nuclear(weight=0)
        optimizer = optax.chain(optax.add_decayed_weights(0.7), optimizer)

    def loss(params, step):
        del step
        return 0.5 * jnp.sum(jnp.square(inputs @ params["u"] @ params["v"] - outputs))

    def objective(params, step):
        return loss(params, step) + penalty(Factors(**params), step)

    found = minimize(objective, params, optimizer, 3000)
    left, values, right = np.linalg.svd(inputs.T @ outputs, full_matrices=False)
    expected = (left * np.maximum(values - 0.7, 0)) @ right
    np.testing.assert_allclose(merged(found), expected, atol=1e-3)
    np.testing.assert_allclose(
        spectrum(found), np.maximum(np.array(TARGET) - 0.7, 0), atol=1e-3
    )
    control = minimize(loss, params, optax.sgd(0.1), 3000)
    np.testing.assert_allclose(spectrum(control), TARGET, atol=1e-3)


@pytest.mark.parametrize("every_steps", [1, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_stable_rank_falls_under_its_penalty(seed, every_steps):
    """From 1.89, what the target has, to 1.50; every fourth step is as good.

    A linear net of two layers, 8x6, weight 2, Adam 0.02, 1,000 steps. Measured: 1.5003,
    every fourth step 1.5001; the control 1.8945.
    """
    target, params = matrix_of(TARGET, (8, 6), seed), start((8, 6), 6, seed)
    penalty = penalties.stable_rank(weight=2, every_steps=every_steps)
    adam = cooled_adam(0.02, 1000)

    def stable_rank(values: np.ndarray) -> float:
        return np.sum(values**2) / values[0] ** 2

    found = spectrum(fit_matrix(target, params, adam, 1000, penalty))
    np.testing.assert_allclose(stable_rank(found), 1.5, atol=0.01)
    control = spectrum(fit_matrix(target, params, adam, 1000))
    np.testing.assert_allclose(
        stable_rank(control), stable_rank(np.array(TARGET)), atol=0.01
    )


def test_the_funnel_separates_columns():
    """Small gates to zero, large ones as they were; l1 shrinks the large by its weight.

    Gates s to learn 4, 3, 2, 1, 1/2, 1/4, 1/10 between fixed unit columns; both lose
    the same four. Funnel: weight 3, c from 2 to 0.05 in 1,000 of 2,000 steps of Adam
    0.02; l1 (the control): weight 1.05. Measured: the three large gates lose 0.009,
    0.016 and 0.037, under l1 1.05 each.
    """
    sizes, steps = np.float32([4, 3, 2, 1, 0.5, 0.25, 0.1]), 2000
    eye = jnp.eye(len(sizes))

    def gates(penalty: Penalty) -> np.ndarray:
        def objective(params, step):
            factors = Factors(eye, eye, params["s"])
            loss = 0.5 * jnp.sum(jnp.square(factors.matrix() - jnp.diag(sizes)))
            return loss + penalty(factors, step)

        found = minimize(
            objective, {"s": jnp.asarray(sizes)}, cooled_adam(0.02, steps), steps
        )
        return np.abs(found["s"])

    funnel = penalties.funnel(weight=3, start=2, end=0.05, anneal_steps=1000)
    found, control = gates(funnel), gates(penalties.l1(weight=1.05))
    for values in (found, control):
        assert (values[3:] < 1e-4).all() and (values[:3] > 0.5).all(), values
    assert (sizes - found)[:3].max() <= 0.05
    assert (sizes - control)[:3].min() >= 1


def test_log_determinant_removes_small_singular_values_and_spares_large_ones():
    """1/2 ||W - diag(3, 2, .3)||^2 by SGD 0.02; without it (control) all stay."""
    target = jnp.diag(jnp.array([3.0, 2.0, 0.3]))

    def fit(weight: float) -> np.ndarray:
        penalty = penalties.log_determinant(
            weight=weight, every_steps=20, start=1.0, end=1e-3, anneal_steps=500
        )

        def loss(layer, state, step):
            value, state = penalty.apply(Factors(**layer), state, step)
            fit = 0.5 * jnp.sum(jnp.square(layer["u"] @ layer["v"] - target))
            return fit + value, state

        def body(carried, step):
            layer, state = carried
            grads, state = jax.grad(loss, has_aux=True)(layer, state, step)
            return (jax.tree.map(lambda p, g: p - 0.02 * g, layer, grads), state), None

        model = Factors.from_matrix(target, 3)
        layer = {"u": model.u[...], "v": model.v[...]}
        carried = layer, penalty.init(nnx.merge(*nnx.split(model)))
        run = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(1500))[0][0])
        layer = run(carried)
        return np.linalg.svd(layer["u"] @ layer["v"], compute_uv=False)

    low, control = fit(0.1), fit(0.0)
    assert low[2] < 0.01 and (low[:2] > [2.9, 1.9]).all(), low
    np.testing.assert_allclose(control, [3, 2, 0.3], atol=1e-4)
