"""Golden values of penalties, and the identities that they obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from penalty_formulas import numpy_funnel, numpy_modified
from reference import relative_error
from spectra import arrays, balanced, golden, matrices, product, single, spectrum

from lowrank_jax import penalties
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.penalties import PENALTIES, check_stateless

WEIGHT = 0.3


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("stable_rank", {}, 1.875),
        ("hoyer", {}, 0.8257418583505538),
        ("hoyer_square", {}, 2.3333333),
        ("l1", {}, 10),
        ("nuclear", {}, 10),
        ("frobenius_decay", {}, 15),
        ("orthogonality", {}, 0),
        ("modified_stable_rank", {"target_ranks": {"": 2}, "power": 1}, 3 / 7),
        ("modified_stable_rank", {"target_ranks": {"": 2}, "power": 2}, 1 / 5),
        ("modified_stable_rank", {"target_ranks": {"": 1}, "power": 2}, 0.875),
        ("modified_stable_rank", {"target_ranks": {"": 4}, "power": 1}, 0),
        ("modified_stable_rank", {"target_ranks": {}}, 0),
        (
            "funnel",
            {"start": 1, "end": 1, "anneal_steps": 1},
            4 / 5 + 3 / 4 + 2 / 3 + 1 / 2,
        ),
    ],
)
def test_golden_values(name, arguments, expected):
    """methods.md 0.2: the spectrum 4, 3, 2, 1, in s and in balanced factors."""
    forms = [golden()]
    if name not in ("l1", "hoyer", "hoyer_square", "orthogonality"):
        forms.append(balanced(golden()))
    for parts in forms:
        value = PENALTIES[name](weight=1, **arguments)(Factors(**parts))
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-9)


def test_orthogonality_of_orthonormal_columns_and_of_twice_them():
    """0 and 9 / 16 = 0.5625 for each factor, tall or wide; `s` does not count."""
    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 16)))
    chosen, s = penalties.orthogonality(weight=1), np.full(16, 5.0)

    def value(u, v) -> float:
        return float(chosen(Factors(**single({"u": u, "s": s, "v": v}))))

    assert value(columns, columns.T) <= 1e-9
    np.testing.assert_allclose(value(2 * columns, columns.T), 0.5625, rtol=1e-5)
    np.testing.assert_allclose(value(2 * columns, 2 * columns.T), 1.125, rtol=1e-5)


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("sizes", [(9, 3, 8), (4, 4, 3)])
def test_frobenius_decay_is_the_decay_of_the_product(with_s, sizes):
    """Value and gradient equal those through W, by Gram matrices and by the product;
    and the gradient by hand is `W v^T diag(|s|)`."""
    parts = single(arrays(0, with_s, sizes=sizes))

    def through_product(parts):
        return 0.5 * WEIGHT * jnp.sum(jnp.square(product_of(parts)))

    def decay(parts):
        return penalties.frobenius_decay(weight=WEIGHT)(Factors(**parts))

    found, expected = (jax.grad(f)(parts) for f in (decay, through_product))
    for name in parts:
        assert relative_error(found[name], expected[name]) <= 1e-5, name
    u, s, v = matrices(arrays(0, with_s, sizes=sizes))[0]
    by_hand = WEIGHT * product(u, s, v) @ v.T * (1 if s is None else np.abs(s))
    assert relative_error(found["u"], by_hand) <= 1e-5


def product_of(parts) -> jax.Array:
    scale = jnp.abs(parts["s"])[None] if "s" in parts else 1
    return (parts["u"] * scale) @ parts["v"]


SCALE_FREE = {
    "hoyer": {},
    "hoyer_square": {},
    "stable_rank": {},
    "modified_stable_rank": {"target_ranks": {"": 1}},
}


def scale_free(name: str, parts) -> jax.Array:
    return PENALTIES[name](weight=1, **SCALE_FREE[name])(Factors(**parts))


@pytest.mark.parametrize("scale", [1e-3, 7.0])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_scale_does_not_matter(name, scale):
    """Of s for Hoyer's, of the product for the stable ranks."""
    layer = single(arrays(0, True))
    scaled = layer | {"s": scale * layer["s"]}
    np.testing.assert_allclose(
        scale_free(name, layer), scale_free(name, scaled), rtol=1e-5
    )


@pytest.mark.parametrize("name", SCALE_FREE)
def test_tiny_matrices_of_a_stack_count_as_their_neighbours(name):
    """Squares of 1e-25 vanish in float32; each matrix is taken at its own scale."""
    layer = single(arrays(0, True))
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), layer)
    stack["s"] = stack["s"] * jnp.array([[1], [1e-25]])
    np.testing.assert_allclose(
        scale_free(name, stack), 2 * scale_free(name, layer), rtol=1e-5
    )


def test_nuclear_bounds_the_nuclear_norm():
    """More than the sum of the singular values, unless the factors are balanced."""
    for with_s in (False, True):
        parts = arrays(0, with_s)
        value = penalties.nuclear(weight=WEIGHT)(Factors(**single(parts)))
        assert value > 1.01 * WEIGHT * spectrum(*matrices(parts)[0]).sum()
        balanced_factors = Factors.from_matrix(
            jnp.float32(product(*matrices(parts)[0])), 2, with_s=with_s
        )
        value = penalties.nuclear(weight=WEIGHT)(balanced_factors)
        expected = WEIGHT * spectrum(*matrices(parts)[0]).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_modified_stable_rank_has_the_gradient_of_its_formula(power):
    """methods.md section 3: `U diag(g) V^T` with g = q s^(q-1)/H past the target and
    -q s^(q-1) T/H^2 before it, taken to the factors by the chain rule."""
    parts = arrays(0, True, sizes=(7, 5, 6))
    (u, s, v), target = matrices(parts)[0], 2
    left, values, right = np.linalg.svd(product(u, s, v), full_matrices=False)
    head, tail = (values[:target] ** power).sum(), (values[target:] ** power).sum()
    g = power * values ** (power - 1) / head
    g[:target] *= -tail / head
    slope = (left * g) @ right
    expected = {
        "u": slope @ v.T * np.abs(s),
        "v": (u * np.abs(s)).T @ slope,
        "s": np.sign(s) * np.einsum("ir,io,ro->r", u, slope, v),
    }
    chosen = penalties.modified_stable_rank(
        weight=1, target_ranks={"": target}, power=power
    )
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, parts)
        value, found = jax.value_and_grad(lambda x: chosen(Factors(**x)))(inputs)
        np.testing.assert_allclose(value, tail / head, rtol=1e-12)
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= 1e-10, name


def test_stacked_targets_are_one_for_each_matrix():
    """Nested lists in the stack's shape, or one number for all."""
    parts = arrays(0, False, (2, 2), sizes=(5, 4, 6))
    model = nnx.Dict(a=Factors(**single(parts)))
    for targets in ([[1, 2], [3, 4]], 2):
        chosen = penalties.modified_stable_rank(weight=1, target_ranks={"a": targets})
        flat = np.broadcast_to(targets, (2, 2)).ravel()
        expected = sum(
            numpy_modified(*matrix, target)
            for matrix, target in zip(matrices(parts), flat, strict=True)
        )
        np.testing.assert_allclose(chosen(model), expected, rtol=1e-5)


def test_layers_without_a_target_are_free():
    """Only what truncation will cut is penalized."""
    model = nnx.Dict({n: Factors(**single(arrays(int(n), False))) for n in "01"})
    chosen = penalties.modified_stable_rank(weight=1, target_ranks={"1": 1})
    expected = numpy_modified(*matrices(arrays(1, False))[0])
    np.testing.assert_allclose(chosen(model), expected, rtol=1e-5)


def test_bad_targets_are_refused_all_at_once():
    """Unknown paths, above the allocated rank, below 1, fractions, wrong nesting."""
    model = nnx.Dict({n: Factors(**single(arrays(0, False))) for n in "abcd"})
    model["e"] = Factors(**single(arrays(0, False, (2,))))
    targets = {"a": 4, "b": -1, "c": 1.5, "d": [1, 1], "e": [1, [2]], "nowhere": 1}
    chosen = penalties.modified_stable_rank(weight=1, target_ranks=targets)
    with pytest.raises(UserError, match="modified_stable_rank.target_ranks") as error:
        check_stateless(chosen, model)
    with pytest.raises(UserError) as called:  # in a run a is lowered, the others stay
        chosen(model)
    given = str(error.value).removeprefix("penalty: ").splitlines()
    assert str(called.value).splitlines() == [given[0], *given[2:]]
    unknown, *lines = str(error.value).splitlines()
    assert "got ['nowhere']" in unknown and "['a', 'b', 'c', 'd', 'e']" in unknown
    assert len(lines) == 5
    for line, path in zip(lines, targets, strict=False):
        assert line.startswith(f"{path}: rank must be")
    assert "in [0, 3], got 4" in lines[0] and "shape (2,)" in lines[4]
    zeros = {"a": 0, "b": 3, "e": [0, 1]}
    chosen = penalties.modified_stable_rank(weight=1, target_ranks=zeros)
    with pytest.raises(UserError, match="ranks: a: .*at least 1") as error:
        chosen(model)
    assert str(error.value).count("leave the path out") == 2 and "e: " in str(
        error.value
    )


@pytest.mark.parametrize("every_steps", [1, 3])
def test_targets_are_lowered_with_what_is_allocated(every_steps):
    """A shrink goes below them; the model of the start must have as much."""
    layers = {"a": arrays(0, False), "b": arrays(1, False, (2,)), "c": arrays(2, False)}
    model = nnx.Dict({path: Factors(**single(parts)) for path, parts in layers.items()})
    chosen = penalties.modified_stable_rank(
        weight=2,
        target_ranks={"a": 2, "": 1},
        every_steps=every_steps,
    )
    with pytest.raises(UserError, match=r"target_ranks: paths: .* got \[''\]"):
        check_stateless(chosen, model)
    targets = {"a": 2, "b": [3, 1], "c": 2}
    chosen = penalties.modified_stable_rank(
        weight=2, target_ranks=targets, every_steps=every_steps
    )
    check_stateless(chosen, model)
    model["a"].cut(0)
    model["b"].cut([2, 2])
    model["c"].cut(1)
    least = {"b": [2, 1], "c": 1}
    same = penalties.modified_stable_rank(
        weight=2, target_ranks=least, every_steps=every_steps
    )
    assert np.isfinite(same(model)) and same(model) > 0
    np.testing.assert_array_equal(chosen(model), same(model))
    gradient = nnx.grad(chosen)(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(UserError, match=r"(?s)a: .*\[0, 0\], got 2.*c: .*\[0, 1\]"):
        check_stateless(chosen, model)
    check_stateless(same, model)


def test_targets_are_bounded_by_the_allocated_rank_not_the_active_one():
    """A masked layer may have a target among its masked columns."""
    parts = arrays(0, False)
    model = Factors(**single(parts))
    model.set_rank(1)
    chosen = penalties.modified_stable_rank(weight=1, target_ranks={"": 2})
    expected = numpy_modified(*matrices(parts)[0], 2)
    np.testing.assert_allclose(chosen(model), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("stable_rank", {}), ("modified_stable_rank", {"target_ranks": {"": 1}})],
)
def test_every_few_steps_have_the_same_mean(name, arguments):
    """Value and gradient, n-fold at steps divisible by n and zero elsewhere."""
    parts = single(arrays(0, True))

    def evaluate(every_steps: int, step):
        chosen = PENALTIES[name](weight=1, every_steps=every_steps, **arguments)
        return jax.value_and_grad(lambda x: chosen(Factors(**x), step))(parts)

    value, gradient = evaluate(1, 0)
    values, gradients = jax.lax.map(lambda step: evaluate(3, step), jnp.arange(6))
    np.testing.assert_allclose(values, [3 * value, 0, 0, 3 * value, 0, 0], rtol=1e-5)
    for part, parts_each in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(parts_each.mean(0), part, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(parts_each[1], 0)


@pytest.mark.parametrize(
    ("step", "c"), [(0, 2.0), (1, 2 / 8**0.25), (2, 2 / 8**0.5), (4, 0.25), (9, 0.25)]
)
def test_the_funnel_narrows_geometrically(step, c):
    """From 2 to 1/4 in 4 steps, then it stays; the step may be traced."""
    parts = arrays(0, True)
    chosen = penalties.funnel(weight=1, start=2, end=0.25, anneal_steps=4)
    model = Factors(**single(parts))
    expected = numpy_funnel(*matrices(parts)[0], c)
    np.testing.assert_allclose(chosen(model, step), expected, rtol=1e-5)
    traced = jax.jit(lambda step: chosen(model, step))(jnp.int32(step))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_the_lasso_pushes_later_columns_harder():
    """Column b is in b groups: of equal columns the last has the largest gradient.

    Which a plain group lasso does not do.
    """
    layer = {"u": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
    for lasso, ordered in (
        (penalties.hierarchical_group_lasso(weight=1), True),
        (penalties.group_lasso(weight=1), False),
    ):
        push = jax.grad(lambda x, p=lasso: p(Factors(**x)))(layer)["u"][0]
        assert np.all(np.diff(push) > 0.01) if ordered else np.ptp(push) < 1e-6
