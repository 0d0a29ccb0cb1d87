"""The reweighted log-determinant: slope, majorization, refreshes, smoothing, cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penalty_formulas import numpy_log_determinant
from reference import relative_error
from spectra import arrays, matrices, product, single, spectrum

from lowrank_jax.factors import Factors
from lowrank_jax.penalties import carry, log_determinant

C = 0.3


def fixed(every_steps: int = 5, weight: float = 1.0):
    """With the same smoothing at all steps."""
    return log_determinant(
        weight=weight, every_steps=every_steps, start=C, end=C, anneal_steps=1
    )


@pytest.mark.parametrize("sizes", [(7, 3, 5), (3, 4, 2), (4, 4, 4)])
@pytest.mark.parametrize("with_s", [False, True])
def test_the_surrogate_touches_the_objective_from_above(with_s, sizes):
    """Equal slopes where P is new, against `W (W^T W + c I)^-1` by NumPy in float64;
    and with the constant that makes the values equal, nowhere below the objective.
    Control: far from the point it is above by more than a tenth.
    """
    parts, penalty = arrays(0, with_s, sizes=sizes), fixed()
    u, s, v = matrices(parts)[0]
    matrix = product(u, s, v)
    slope = matrix @ np.linalg.inv(matrix.T @ matrix + C * np.eye(len(matrix.T)))
    scale = 1 if s is None else np.abs(s)
    expected = {"u": slope @ v.T * scale, "v": (u * scale).T @ slope}
    with jax.enable_x64(True):
        start = jax.tree.map(jnp.asarray, parts)
        state = penalty.init(Factors(**start))

        @jax.jit
        def value(layer):
            return penalty.apply(Factors(**layer), state, 1)[0]

        here, found = jax.jit(jax.value_and_grad(value))(start)
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= 1e-10, name
        constant, above = numpy_log_determinant(u, s, v, C) - float(here), []
        for seed in range(1, 6):
            for share in (0.01, 0.3, 1.0, 10.0):
                other = arrays(seed, with_s, sizes=sizes)
                moved = jax.tree.map(lambda a, b, t=share: a + t * b, parts, other)
                objective = numpy_log_determinant(*matrices(moved)[0], C)
                above.append(float(value(moved)) + constant - objective)
    assert min(above) >= -1e-10 and max(above) > 0.1


def test_weights_are_refreshed_every_few_steps_and_stay_in_between():
    """In one jitted scan over a model that moves at each step."""
    layer, penalty = single(arrays(0, True, (2,))), fixed(every_steps=3)

    @jax.jit
    def run(state):
        def body(state, step):
            moved = layer | {"s": layer["s"] * (1 + step)}
            value, state = penalty.apply(Factors(**moved), state, step)
            return state, (value, state)

        return jax.lax.scan(body, state, jnp.arange(1, 8))[1]

    values, states = run(penalty.init(Factors(**layer)))
    made_at = np.arange(1, 8) // 3 * 3  # the step that each state is from
    squares = np.stack([spectrum(*m)[:2] ** 2 for m in matrices(arrays(0, True, (2,)))])
    expected = squares[None] * (1.0 + made_at)[:, None, None] ** 2
    np.testing.assert_allclose(
        states.squares[""][..., :2], expected, rtol=1e-4, atol=1e-4
    )
    growth = np.diff(values)
    assert (growth[[0, 2, 3, 5]] > 0).all()  # P is old, W grows
    assert (growth[[1, 4]] < 0).all()  # P is new: at most half a column each
    assert values[2] < 2 and values[5] < 2


def test_smoothing_falls_at_refreshes_and_goes_over_a_cut():
    """Geometrically, from 1 to 1/16 in 4 steps; a cut makes the rest of P anew."""
    penalty = log_determinant(
        weight=1, every_steps=2, start=1.0, end=1 / 16, anneal_steps=4
    )
    model = Factors(**single(arrays(0, False)))
    state, found, apply = penalty.init(model), [], jax.jit(penalty.apply)
    for step in range(7):
        _, state = apply(model, state, jnp.int32(step))
        found.append(float(state.smoothing))
    np.testing.assert_allclose(found, [1, 1, 1 / 4, 1 / 4, 1 / 16, 1 / 16, 1 / 16])
    model.cut(1)
    kept = carry(penalty, state, model)
    assert kept.left[""].shape == (4, 1) and float(kept.smoothing) == 1 / 16
    fresh = penalty.init(model)
    assert jax.tree.map(jax.typeof, kept) == jax.tree.map(jax.typeof, fresh)
    np.testing.assert_allclose(kept.squares[""], fresh.squares[""])
