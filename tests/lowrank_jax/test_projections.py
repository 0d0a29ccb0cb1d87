"""Projections of spectra against the formula on dense matrices, and their protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error
from spectra import GOLDEN, arrays, balanced, golden, matrices, product, single

from lowrank_jax import projections
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.projections import PROJECTIONS, stable_rank_normalization


def project(parts, limit: float, step: int = 0, **options) -> dict[str, np.ndarray]:
    """The arrays after stable-rank normalization, in jit."""

    @jax.jit
    def run(parts, step):
        factors = Factors(**parts)
        stable_rank_normalization(stable_rank=limit, **options)(factors, step)
        return {
            n: x for n, x in zip("usv", factors.arrays(), strict=True) if n in parts
        }

    return jax.tree.map(np.float64, run(parts, step))


def merged(parts) -> np.ndarray:
    return product(*matrices(jax.tree.map(np.float64, parts))[0])


def normalized(matrix: np.ndarray, limit: float) -> np.ndarray:
    """Stable-rank normalization of a dense matrix, as Sanyal et al. (2020) state it."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    first = values[0] * np.outer(left[:, 0], right[0])
    rest = matrix - first
    gamma = np.sqrt(limit - 1) * values[0] / np.linalg.norm(rest)
    return first + min(gamma, 1) * rest


def limit_below(parts, share: float) -> float:
    """This share of the way from 1 to the stable rank."""
    values = np.linalg.svd(merged(parts), compute_uv=False)
    return 1 + share * (np.sum(values**2) / values[0] ** 2 - 1)


def test_the_table_of_projections():
    """One so far; the tests below are of it."""
    assert PROJECTIONS == {"stable_rank_normalization": stable_rank_normalization}


@pytest.mark.parametrize("form", [golden, lambda: balanced(golden())])
def test_stable_rank_normalization_has_the_golden_values(form):
    """methods.md 0.2: tail factor 0.7559289, spectrum (1, .5669, .3780, .1890) x 4."""
    parts = form()
    after = project(parts, 1.5)
    values = np.linalg.svd(merged(after), compute_uv=False)[:4]
    np.testing.assert_allclose(values[1:] / GOLDEN[1:], 0.7559289, rtol=1e-5)
    expected = [1, 0.56694671, 0.37796447, 0.18898224]
    np.testing.assert_allclose(values / 4, expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("sizes", [(6, 4, 5), (3, 4, 2)])
def test_stable_rank_normalization_is_that_of_the_product(with_s, sizes, share):
    """From any factors, orthonormal or not; `s` stays, and a second time nothing
    changes."""
    parts = single(arrays(5, with_s, sizes=sizes))
    limit = limit_below(parts, share)
    after = project(parts, limit)
    expected = normalized(merged(parts), limit)
    assert relative_error(expected, merged(parts)) > 0.01  # it is above the limit
    assert relative_error(merged(after), expected) <= 1e-5
    if with_s:
        np.testing.assert_array_equal(after["s"], parts["s"])
    again = project(single(after), limit)
    for name, array in after.items():
        assert relative_error(again[name], array) <= 1e-4, name


def test_stable_rank_normalization_keeps_the_gauge():
    """`u` and `v` are the old ones through a fixed linear map of the input and output
    space, so the parts along p_1 and q_1 stay as they are, and others shrink alike.

    Control: the SVD of the same product is far from the old factors.
    """
    parts = single(arrays(5, True, sizes=(6, 4, 5)))
    limit = limit_below(parts, 0.3)
    after, before = project(parts, limit), jax.tree.map(np.float64, parts)
    left, values, right = np.linalg.svd(merged(parts), full_matrices=False)
    gamma = np.sqrt(limit - 1) * values[0] / np.linalg.norm(values[1:])
    for name, first in (("u", left[:, 0]), ("v", right[0])):
        old, new = before[name], after[name]
        if name == "v":
            old, new = old.T, new.T
        np.testing.assert_allclose(first @ new, first @ old, atol=1e-5)
        rest = np.eye(len(first)) - np.outer(first, first)
        assert relative_error(rest @ new, np.sqrt(gamma) * rest @ old) <= 1e-5
    canonical = np.linalg.svd(merged(after), full_matrices=False)[0][:, :4]
    assert relative_error(canonical, before["u"]) > 2 * relative_error(
        after["u"], before["u"]
    )


def test_stable_rank_normalization_leaves_the_rest_alone():
    """Below the limit, zero, and without columns: the same bits; in a stack each matrix
    by itself."""
    low, zero = golden(), single({"u": np.zeros((4, 3)), "v": np.zeros((3, 2))})
    for parts, limit in ((low, 1.9), (zero, 1.0), (zero, 2.0)):
        for name, array in project(parts, limit).items():
            np.testing.assert_array_equal(array, parts[name])
    empty = project(single(arrays(0, True, sizes=(4, 0, 2))), 1.5)
    assert empty["u"].shape == (4, 0)
    high, stack = balanced(golden()), {}
    for name, array in high.items():
        stack[name] = jnp.stack([array, jnp.zeros_like(array)])
    after, alone = project(stack, 1.5), project(high, 1.5)
    for name, array in after.items():
        np.testing.assert_allclose(array[0], alone[name], atol=1e-6)
        np.testing.assert_array_equal(array[1], 0)


def test_projections_every_few_steps():
    """Only at steps divisible by n."""
    parts = golden()
    for step in range(4):
        after = project(parts, 1.5, step, every_steps=3)
        assert np.array_equal(after["u"], parts["u"]) == (step % 3 != 0)


def test_projections_refuse_what_they_cannot_do():
    """Bad arguments in the factory; layers with middle factors by name."""
    with pytest.raises(ValueError, match="stable_rank: must be >= 1, got 0.9"):
        stable_rank_normalization(stable_rank=0.9)
    with pytest.raises(ValueError, match="every_steps: must be >= 1, got 0"):
        stable_rank_normalization(stable_rank=2, every_steps=0)
    deep = Factors(**single(arrays(0, False)))
    deep.middle = nnx.data(nnx.Param(jnp.zeros((1, 3, 3))))
    with pytest.raises(ValueError, match="a/b: .*got middle factors.*Canonicalize"):
        stable_rank_normalization(stable_rank=2)(nnx.Dict(a=nnx.Dict(b=deep)), 0)


def test_a_projection_does_not_depend_on_the_active_rank():
    """It is over the allocated columns, of a stack with different ranks too."""
    stack = single(arrays(5, False, (2,), sizes=(6, 4, 5)))
    whole, masked = Factors(**stack), Factors(**stack)
    masked.set_rank([1, 3])
    for factors in (whole, masked):
        stable_rank_normalization(stable_rank=1.2)(factors)
    for name in "uv":
        after = getattr(whole, name)[...]
        assert relative_error(after, stack[name]) > 0.01
        np.testing.assert_array_equal(getattr(masked, name)[...], after)
    assert masked.get_rank() == [1, 3]


def momentum() -> projections.StatefulProjection:
    """A toy that moves each `u` to its mean with the one before."""

    def init(model):
        return {path: f.u[...] for path, f in find_factors(model).items()}

    def apply(model, state, step):
        for path, factors in find_factors(model).items():
            factors.u.set_value((factors.u[...] + state[path]) / 2)
        return init(model)

    return projections.StatefulProjection(init, apply)


def test_projections_with_and_without_a_state_have_one_form():
    """`stateful` leaves one with a state as it is; a function gets the state `()`."""
    before = single(arrays(5, False))
    model, plain = Factors(**before), Factors(**before)
    projection = projections.stateful(stable_rank_normalization(stable_rank=1.2))
    assert projection.init(model) == ()
    assert projection.apply(model, (), 0) == ()
    stable_rank_normalization(stable_rank=1.2)(plain)
    np.testing.assert_array_equal(model.u[...], plain.u[...])

    moving = projections.stateful(momentum())
    state = moving.init(model)
    first = model.u[...]
    model.u.set_value(3 * first)
    state = moving.apply(model, state, 1)
    np.testing.assert_allclose(model.u[...], 2 * first, rtol=1e-6)
    model.cut(1)
    assert projections.carry(moving, state, model)[""].shape == model.u.shape


def test_a_projection_that_keeps_something_is_refused():
    """Honest ones pass, concrete and abstract; a closure is no state."""
    model = Factors(**single(arrays(5, False)))
    kept = {}

    def closure(model, step=0):
        kept.setdefault("u", model.u[...])
        model.u.set_value((model.u[...] + kept["u"]) / 2)

    with pytest.raises(UserError, match="projection: .*init.model."):
        projections.check_stateless(closure, model)
    abstract = nnx.eval_shape(lambda: model)
    for honest in (momentum(), stable_rank_normalization(stable_rank=1.5)):
        projections.check_stateless(honest, model)
        projections.check_stateless(honest, abstract)
