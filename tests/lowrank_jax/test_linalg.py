"""Spectra, the canonical form and norms against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error, spectrum_error

from lowrank_jax import linalg

SHAPES = {
    "tall": (7, 4),
    "wide": (3, 5),
    "square": (4, 4),
    "stacked": (2, 5, 3),
    "two stack axes": (2, 3, 3, 4),
    "row": (1, 4),
}


def random(*shape: int, seed: int = 0) -> jax.Array:
    draw = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(draw, jnp.float32)


def transposed(x) -> np.ndarray:
    return np.swapaxes(np.asarray(x), -1, -2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_truncated_svd_is_the_nearest_of_its_rank(shape):
    """The product is as near as Eckart-Young allows; the sides are orthonormal."""
    matrix = random(*shape)
    spectrum = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    for rank in range(min(shape[-2:]) + 1):
        u, s, v = linalg.truncated_svd(matrix, rank)
        assert u.shape == (*shape[:-1], rank)
        assert v.shape == (*shape[:-2], rank, shape[-1])
        np.testing.assert_allclose(s, spectrum[..., :rank], atol=1e-5)
        distance = np.linalg.norm(matrix - u * s[..., None, :] @ v, axis=(-2, -1))
        np.testing.assert_allclose(distance, spectrum_error(matrix, rank), atol=1e-5)
        eye = np.broadcast_to(np.eye(rank), (*shape[:-2], rank, rank))
        assert relative_error(transposed(u) @ np.asarray(u), eye) <= 1e-5
        assert relative_error(np.asarray(v) @ transposed(v), eye) <= 1e-5


def test_truncated_svd_computes_bfloat16_in_float32():
    """Half precision in, half precision out; the triplets differ by rounding alone."""
    matrix = random(5, 4).astype(jnp.bfloat16)
    parts = linalg.truncated_svd(matrix, 3)
    assert {part.dtype for part in parts} == {jnp.dtype(jnp.bfloat16)}
    for part, wide in zip(
        parts, linalg.truncated_svd(matrix.astype(jnp.float32), 3), strict=True
    ):
        np.testing.assert_array_equal(part, wide.astype(jnp.bfloat16))


def factored(name: str):
    """Factors `u, s, v` of one kind; the product of some has a lower rank than `r`."""
    match name:
        case "product":
            return random(7, 3), None, random(3, 5, seed=1)
        case "scales of both signs":
            return random(7, 3), jnp.array([0.5, -3.0, 1.0]), random(3, 5, seed=1)
        case "stacked":
            return random(2, 6, 3), random(2, 3, seed=2), random(2, 3, 4, seed=1)
        case "rank above both sides":
            return random(3, 6), random(6, seed=2), random(6, 4, seed=1)
        case "rank above one side, stacked":
            return random(2, 3, 4), None, random(2, 4, 6, seed=1)
        case "zero columns":
            u, v = random(6, 4), random(4, 5, seed=1)
            return u.at[:, 1].set(0).at[:, 3].set(0), None, v.at[1].set(0)
        case "all zero":
            return jnp.zeros((4, 2)), jnp.zeros(2), jnp.zeros((2, 3))
        case "equal singular values":
            return jnp.eye(5)[:, :3], jnp.full(3, 2.0), jnp.eye(3)


FACTORED = (
    "product",
    "scales of both signs",
    "stacked",
    "rank above both sides",
    "rank above one side, stacked",
    "zero columns",
    "all zero",
    "equal singular values",
)


@pytest.mark.parametrize("name", FACTORED)
def test_canonical_form_is_the_svd_of_the_product(name):
    """Same function and shapes, falling spectrum, every prefix by Eckart-Young."""
    u, s, v = factored(name)
    scale = 1 if s is None else np.abs(s)[..., None, :]
    product = (np.asarray(u, np.float64) * scale) @ np.asarray(v, np.float64)
    left, sigma, right = map(np.asarray, linalg.canonical_form(u, s, v))
    assert (left.shape, right.shape) == (u.shape, v.shape)
    assert np.all(np.diff(sigma, axis=-1) <= 0) and np.all(sigma >= 0)
    rank, kept = u.shape[-1], min(product.shape[-2:] + u.shape[-1:])
    spectrum = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(sigma[..., :kept], spectrum[..., :kept], atol=1e-5)
    eye = np.broadcast_to(np.eye(kept), (*product.shape[:-2], kept, kept))
    head, tail = left[..., :kept], right[..., :kept, :]
    np.testing.assert_allclose(transposed(head) @ head, eye, atol=1e-5)
    np.testing.assert_allclose(tail @ transposed(tail), eye, atol=1e-5)
    for array in (left[..., :, kept:], sigma[..., kept:], right[..., kept:, :]):
        np.testing.assert_array_equal(array, 0)
    for prefix in range(rank + 1):
        near = (left * sigma[..., None, :])[..., :prefix] @ right[..., :prefix, :]
        distance = np.linalg.norm(product - near, axis=(-2, -1))
        np.testing.assert_allclose(distance, spectrum_error(product, prefix), atol=2e-5)


def test_canonical_form_at_rank_zero_is_empty():
    """Rank 0 is legal and keeps its shapes, stack axes included."""
    left, sigma, right = linalg.canonical_form(
        jnp.zeros((2, 4, 0)), None, jnp.zeros((2, 0, 3))
    )
    assert [x.shape for x in (left, sigma, right)] == [(2, 4, 0), (2, 0), (2, 0, 3)]


@pytest.mark.parametrize("name", ["product", "scales of both signs", "stacked"])
def test_column_norms_are_squared_norms_of_the_scaled_columns(name):
    """`|s|` counts on the side of `u`, once."""
    u, s, v = factored(name)
    scaled = np.asarray(u) * (1 if s is None else np.asarray(s)[..., None, :])
    left, right = linalg.column_norms(u, s, v)
    np.testing.assert_allclose(left, np.linalg.norm(scaled, axis=-2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(right, np.linalg.norm(v, axis=-1) ** 2, rtol=1e-5)


def test_safe_sqrt_is_the_square_root_with_gradient_zero_at_zero():
    """At 0 both value and gradient are 0; elsewhere they are the usual ones."""
    x = jnp.array([0.0, 1e-12, 0.25, 9.0])
    root, pullback = jax.vjp(linalg.safe_sqrt, x)
    np.testing.assert_allclose(root, [0, 1e-6, 0.5, 3], rtol=1e-6)
    (gradient,) = pullback(jnp.ones(4))
    np.testing.assert_allclose(gradient, [0, 5e5, 1, 1 / 6], rtol=1e-5)


def test_tail_norms_of_the_golden_spectrum():
    """Spectrum (4, 3, 2, 1): the norms of what is left from each column on."""
    norms = linalg.tail_norms(jnp.square(jnp.array([4.0, 3.0, 2.0, 1.0])))
    np.testing.assert_allclose(norms, np.sqrt([30.0, 14.0, 5.0, 1.0]), rtol=1e-6)


def test_tail_norms_of_stacks_follow_the_definition():
    """Entry b is the Frobenius norm of columns b to the last of each matrix."""
    matrix = np.asarray(random(2, 5, 4))
    expected = [np.linalg.norm(matrix[..., b:], axis=(-2, -1)) for b in range(4)]
    norms = linalg.tail_norms(jnp.sum(jnp.square(matrix), axis=-2))
    np.testing.assert_allclose(norms, np.stack(expected, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("zeros", [1, 2, 4])
def test_gradient_of_tail_norms_is_finite_with_zero_tails(zeros):
    """Zero columns get gradient 0, the others what they get without the tail."""

    def penalty(x):
        return jnp.sum(linalg.tail_norms(jnp.sum(jnp.square(x), axis=0)))

    matrix = np.array(random(3, 4))
    matrix[:, 4 - zeros :] = 0
    gradient = np.asarray(jax.grad(penalty)(jnp.asarray(matrix)))
    tails = [np.linalg.norm(matrix[:, b:]) for b in range(4 - zeros)]
    expected = np.zeros_like(matrix)
    for column in range(4 - zeros):
        expected[:, column] = matrix[:, column] * np.sum(
            1 / np.array(tails[: column + 1])
        )
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 4 - zeros :], 0)


def in_double(name: str) -> list[np.ndarray | None]:
    return [None if x is None else np.asarray(x, np.float64) for x in factored(name)]


def numpy_product(u, s, v) -> np.ndarray:
    scale = 1 if s is None else np.abs(s)[..., None, :]
    return (np.asarray(u, np.float64) * scale) @ np.asarray(v, np.float64)


@pytest.mark.parametrize("name", FACTORED)
def test_singular_values_are_those_of_the_product(name):
    """The min(i, r, o) largest; under vmap over the stack, too, and in jit."""
    u, s, v = factored(name)
    product = numpy_product(u, s, v)
    found = jax.jit(linalg.singular_values)(u, s, v)
    size = min(*product.shape[-2:], u.shape[-1])
    assert found.shape == (*u.shape[:-2], size) and found.dtype == jnp.float32
    expected = np.linalg.svd(product, compute_uv=False)[..., :size]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    if u.ndim > 2:
        each = jax.vmap(linalg.singular_values)(u, s, v)
        np.testing.assert_allclose(each, expected, atol=2e-5)


@pytest.mark.parametrize("name", FACTORED[:5])
def test_gradient_of_singular_values_equals_central_differences(name):
    """Of a sum with random weights, in float64; every shape's own way of reduction."""
    parts = in_double(name)
    weights = np.random.default_rng(3).normal(size=8)

    def numpy_sum() -> float:
        spectrum = np.linalg.svd(numpy_product(*parts), compute_uv=False)
        spectrum = spectrum[..., : parts[0].shape[-1]]
        return float(np.sum(spectrum * weights[: spectrum.shape[-1]]))

    with jax.enable_x64(True):
        present = {n: jnp.asarray(x) for n, x in enumerate(parts) if x is not None}

        def weighted(present):
            values = linalg.singular_values(*(present.get(n) for n in range(3)))
            scale = jnp.broadcast_to(weights[: values.shape[-1]], values.shape)
            return jnp.sum(values * scale)

        gradient = jax.jit(jax.grad(weighted))(present)
    for n, found in gradient.items():
        expected = np.zeros_like(parts[n])
        for index in np.ndindex(expected.shape):
            keep, ends = parts[n][index], []
            for nudge in (1e-5, -1e-5):
                parts[n][index] = keep + nudge
                ends.append(numpy_sum())
            parts[n][index] = keep
            expected[index] = (ends[0] - ends[1]) / 2e-5
        assert relative_error(found, expected) <= 1e-7, n


@pytest.mark.parametrize("name", FACTORED[5:])
def test_gradient_of_singular_values_is_finite_where_their_vectors_have_none(name):
    """At zero columns, at the zero matrix, and where values repeat: `P Q^T` of the
    triplets that are not zero.

    Control: the derivative through the factors of the decomposition is not finite at
    two of the three.
    """
    u, s, v = factored(name)

    def total(u, v, values=linalg.singular_values):
        return jnp.sum(values(u, s, v))

    left, values, right = np.linalg.svd(numpy_product(u, s, v), full_matrices=False)
    slope = left @ np.diag(values > 1e-5) @ right
    scale = 1 if s is None else np.abs(s)
    for_u, for_v = jax.grad(total, argnums=(0, 1))(u, v)
    np.testing.assert_allclose(for_u, slope @ np.asarray(v).T * scale, atol=1e-5)
    np.testing.assert_allclose(for_v, (np.asarray(u) * scale).T @ slope, atol=1e-5)
    if name != "equal singular values":  # for them JAX differentiates values alone
        naive = jax.grad(total)(u, v, lambda *parts: linalg.canonical_form(*parts)[1])
        assert not np.all(np.isfinite(naive))


def test_singular_values_that_repeat_have_the_gradient_of_their_sum():
    """Of the identity times 2: d(sum of the values) is P Q^T = the identity."""
    gradient = jax.grad(lambda u: jnp.sum(linalg.singular_values(u, None, jnp.eye(3))))
    np.testing.assert_allclose(gradient(2 * jnp.eye(3)), np.eye(3), atol=1e-6)


def test_singular_values_form_no_large_matrix():
    """Of (40, 3) and (3, 50), forward and back: nothing near the size of the product.

    Control: the product of the factors is seen by the same count.
    """
    u, v = random(40, 3), random(3, 50, seed=1)

    def largest(function) -> int:
        return max(array_sizes(jax.make_jaxpr(jax.grad(function))(u, v).jaxpr))

    assert largest(lambda u, v: jnp.sum(linalg.singular_values(u, None, v))) <= 200
    assert largest(lambda u, v: jnp.sum(jnp.square(u @ v))) == 2000


def array_sizes(jaxpr) -> list[int]:
    """The sizes of all arrays that a program computes, inner programs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                sizes += array_sizes(getattr(value, "jaxpr", value))
    return sizes


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_singular_values_of_half_precision_and_of_nothing():
    """bfloat16 is computed in float32, with a gradient in bfloat16; rank 0 is empty."""
    u, v = random(5, 2).astype(jnp.bfloat16), random(2, 4, seed=1).astype(jnp.bfloat16)
    found = linalg.singular_values(u, None, v)
    wide = linalg.singular_values(u.astype(jnp.float32), None, v.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide)
    gradient = jax.grad(lambda u: linalg.singular_values(u, None, v)[0])(u)
    assert gradient.dtype == jnp.bfloat16
    empty = linalg.singular_values(jnp.zeros((2, 4, 0)), None, jnp.zeros((2, 0, 3)))
    assert empty.shape == (2, 0)


def test_a_nan_is_not_swallowed():
    """A run that has gone wrong must show it in its penalties."""
    u, v = random(6, 3).at[2, 1].set(np.nan), random(3, 6)
    assert np.all(np.isnan(linalg.singular_values(u, None, v)))
    assert np.all(np.isnan(linalg.singular_values(v.T, None, u.T)))
    assert np.isnan(linalg.squared_norm(u, None, v))
    root, gradient = jax.value_and_grad(linalg.safe_sqrt)(jnp.float32(np.nan))
    assert np.isnan(root) and np.isnan(gradient)


@pytest.mark.parametrize("name", FACTORED)
def test_squared_norm_is_that_of_the_product(name):
    """Of each matrix of a stack by itself."""
    parts = factored(name)
    expected = np.sum(np.square(numpy_product(*parts)), axis=(-2, -1))
    np.testing.assert_allclose(linalg.squared_norm(*parts), expected, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(40, 6, 30), (6, 40, 5), (4, 50, 60)])
def test_squared_norm_does_not_cancel(sizes):
    """Columns that nearly cancel in the product: u = (a, a), v = (b, -b + small).

    Control: the Gram form in float32 is off by more than its value.
    """
    in_size, rank, out_size = sizes
    side, half = random(in_size, rank), random(rank, out_size, seed=1)
    u = jnp.concatenate([side, side], axis=1)
    v = jnp.concatenate([half, 1e-4 * random(rank, out_size, seed=2) - half])
    expected = np.sum(np.square(numpy_product(u, None, v)))
    found, gradients = jax.value_and_grad(
        lambda u, v: linalg.squared_norm(u, None, v), argnums=(0, 1)
    )(u, v)
    np.testing.assert_allclose(found, expected, rtol=0.01)
    product = numpy_product(u, None, v)
    assert relative_error(gradients[0], 2 * product @ transposed(v)) <= 0.01
    assert relative_error(gradients[1], 2 * transposed(u) @ product) <= 0.01
    gram = jnp.sum((u.T @ u) * (v @ v.T))
    assert abs(float(gram) - expected) > expected


def test_squared_norm_has_the_gradient_of_the_product():
    """`d||u v||^2 = 2 (u v) v^T`, by hand; a Hessian times a vector by differences."""
    u, v, way = random(30, 3), random(3, 20, seed=1), random(30, 3, seed=2)
    gradient = jax.grad(lambda u: linalg.squared_norm(u, None, v))
    expected = 2 * numpy_product(u, None, v) @ np.asarray(v, np.float64).T
    assert relative_error(gradient(u), expected) <= 1e-5
    _, curvature = jax.jvp(gradient, (u,), (way,))
    assert relative_error(curvature, 2 * numpy_product(way, None, v) @ v.T) <= 1e-5


@pytest.mark.parametrize("name", ["zero columns", "all zero"])
def test_gradient_of_squared_norm_is_finite_at_zero_columns(name):
    """0 for the other side of a column that is zero on one."""
    u, s, v = factored(name)
    product = numpy_product(u, s, v)
    scale = 1 if s is None else np.abs(s)
    for_u, for_v = jax.grad(lambda u, v: linalg.squared_norm(u, s, v), argnums=(0, 1))(
        u, v
    )
    np.testing.assert_allclose(for_u, 2 * product @ transposed(v) * scale, atol=1e-4)
    np.testing.assert_allclose(
        for_v, 2 * transposed(np.asarray(u) * scale) @ product, atol=1e-4
    )


@pytest.mark.parametrize("sizes", [(64, 32, 16), (32, 64, 4)])
def test_random_factors_have_the_variance_and_are_balanced(sizes):
    """The product's entries have the variance, the columns of both sides one norm.

    Means over 64 matrices: within 5 %; the entries of one are far from independent.
    """
    in_size, out_size, rank = sizes
    key, variance = jax.random.key(0), 0.3
    u, v = linalg.random_factors(key, *sizes, variance=variance, stack=(64,))
    assert u.shape == (64, in_size, rank) and v.shape == (64, rank, out_size)
    assert u.dtype == v.dtype == jnp.float32
    np.testing.assert_allclose(np.var(numpy_product(u, None, v)), variance, rtol=0.05)
    left, right = np.var(u) * in_size, np.var(v) * out_size
    np.testing.assert_allclose(left, right, rtol=0.05)
    other = linalg.random_factors(jax.random.key(1), *sizes, variance=variance)
    assert abs(np.corrcoef(np.ravel(other[0]), np.ravel(u[0]))[0, 1]) < 0.2


def test_random_factors_of_other_types_and_of_rank_zero():
    """The dtype asked for; a traced variance; no columns, no division by zero."""
    draw = jax.jit(
        lambda variance: linalg.random_factors(
            jax.random.key(0), 4, 3, 2, variance=variance, dtype=jnp.bfloat16
        )
    )
    assert {part.dtype for part in draw(0.5)} == {jnp.dtype(jnp.bfloat16)}
    u, v = linalg.random_factors(jax.random.key(0), 4, 3, 0, variance=1)
    assert u.shape == (4, 0) and v.shape == (0, 3)
