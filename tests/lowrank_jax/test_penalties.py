"""Penalties: one table with each one's formula in float64 NumPy.

A new penalty is one more row. Values, gradients, stacks and the allocated columns are
checked for all. Projections of spectra are at the end.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax import penalties
from lowrank_jax.factors import Factors
from lowrank_jax.penalties import PENALTIES, Penalty
from lowrank_jax.projections import PROJECTIONS, stable_rank_normalization

WEIGHT = 0.3
GOLDEN = np.array([4.0, 3.0, 2.0, 1.0])
C = 0.7  # the funnel's constant at step 0


def columns(u, s, v) -> list[np.ndarray]:
    """Columns of `u diag(|s|)`, then the rows of `v`."""
    return [*(u if s is None else u * np.abs(s)).T, *v]


def product(u, s, v) -> np.ndarray:
    return (u if s is None else u * np.abs(s)) @ v


def spectrum(u, s, v) -> np.ndarray:
    return np.linalg.svd(product(u, s, v), compute_uv=False)


def numpy_hierarchical(u, s, v) -> float:
    """The double sum of eq. 7 as it stands."""
    left = u if s is None else u * np.abs(s)
    return sum(
        np.linalg.norm(side[:, first:])
        for side in (left, v.T)
        for first in range(side.shape[1])
    )


def numpy_group(u, s, v) -> float:
    return sum(np.linalg.norm(column) for column in columns(u, s, v))


def numpy_orthogonality(u, s, v) -> float:
    """By the singular values of the factors: those of the Gram matrix less 1."""
    return sum(
        np.sum(np.square(np.square(np.linalg.svd(side, compute_uv=False)) - 1))
        / min(side.shape) ** 2
        for side in (u, v)
    )


def numpy_modified(u, s, v, target: int = 1, power: int = 2) -> float:
    values = spectrum(u, s, v) ** power
    return values[target:].sum() / values[:target].sum()


def numpy_nuclear(u, s, v) -> float:
    scales = np.ones(u.shape[1]) if s is None else np.abs(s)
    return sum(
        scale * (np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2) / 2
        for scale, a, b in zip(scales, u.T, v, strict=True)
    )


def numpy_funnel(u, s, v, c: float = C) -> float:
    sizes = np.linalg.norm(u, axis=0) * np.linalg.norm(v, axis=1)
    sizes = sizes if s is None else np.abs(s)
    return float(np.sum(1 - c / (sizes + c)))


@dataclasses.dataclass(frozen=True)
class Row:
    """A penalty by name and the direct formula of one matrix.

    Args:
      name: Of the penalty.
      reference: From `u, s, v` of one matrix in float64.
      arguments: Beside the weight, for layers of these paths.
      needs_s: Whether layers without `s` are refused.
    """

    name: str
    reference: Callable[..., float]
    arguments: Callable[[Iterable[str]], dict[str, Any]] = lambda paths: {}
    needs_s: bool = False

    def make(self, paths: Iterable[str] = (), weight: float = WEIGHT) -> Penalty:
        return PENALTIES[self.name](weight=weight, **self.arguments(paths))

    def kinds(self) -> list[bool]:
        return [True] if self.needs_s else [False, True]


ROWS = [
    Row("hierarchical_group_lasso", numpy_hierarchical),
    Row("group_lasso", numpy_group),
    Row("orthogonality", numpy_orthogonality),
    Row("l1", lambda u, s, v: np.linalg.norm(s, 1), needs_s=True),
    Row(
        "hoyer",
        lambda u, s, v: np.linalg.norm(s, 1) / np.linalg.norm(s) - 1,
        needs_s=True,
    ),
    Row(
        "hoyer_square",
        lambda u, s, v: (np.linalg.norm(s, 1) / np.linalg.norm(s)) ** 2 - 1,
        needs_s=True,
    ),
    Row(
        "stable_rank",
        lambda *x: (np.linalg.norm(product(*x)) / np.linalg.norm(product(*x), 2)) ** 2,
    ),
    Row(
        "modified_stable_rank",
        numpy_modified,
        lambda paths: {"target_ranks": dict.fromkeys(paths, 1)},
    ),
    Row("nuclear", numpy_nuclear),
    Row("frobenius_decay", lambda *x: np.linalg.norm(product(*x)) ** 2 / 2),
    Row(
        "funnel",
        numpy_funnel,
        lambda paths: {"start": C, "end": 0.1, "anneal_steps": 10},
    ),
]
CASES = [
    pytest.param(row, with_s, id=f"{row.name}-{'usv' if with_s else 'uv'}")
    for row in ROWS
    for with_s in row.kinds()
]


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def arrays(
    seed: int, with_s: bool, stack: tuple[int, ...] = (), sizes=(4, 3, 2)
) -> dict[str, np.ndarray]:
    """Random `u (4, 3)`, `v (3, 2)` and `s`, float64."""
    random = np.random.default_rng(seed)
    in_size, rank, out_size = sizes
    shapes = {"u": (*stack, in_size, rank), "v": (*stack, rank, out_size)}
    if with_s:
        shapes["s"] = (*stack, rank)
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def matrices(parts: dict[str, np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """`u, s, v` of each matrix of a stack."""
    found = []
    for index in np.ndindex(parts["u"].shape[:-2]):
        s = parts["s"][index] if "s" in parts else None
        found.append((parts["u"][index], s, parts["v"][index]))
    return found


def reference(row: Row, layers: list[dict[str, np.ndarray]]) -> float:
    return WEIGHT * sum(
        row.reference(*one) for parts in layers for one in matrices(parts)
    )


def penalty(row: Row, layers, step: int = 0):
    factors = {str(n): Factors(**parts) for n, parts in enumerate(layers)}
    return row.make(factors)(factors, step)


def single(layer) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.float32, layer)


def golden(size: int = 4) -> dict[str, jax.Array]:
    """Factors with the spectrum 4, 3, 2, 1 in `s` and random singular vectors."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(n, 4)))[0] for n in (size + 2, size))
    return single({"u": u, "s": GOLDEN * [1, -1, 1, -1], "v": v.T})


def balanced(parts) -> dict[str, jax.Array]:
    root = jnp.sqrt(jnp.abs(parts["s"]))
    return {"u": parts["u"] * root[None], "v": root[:, None] * parts["v"]}


def test_every_penalty_has_a_row():
    """A penalty without a row would be untested."""
    assert [row.name for row in ROWS] == list(PENALTIES)


@pytest.mark.parametrize(("row", "with_s"), CASES)
def test_value_and_gradient_equal_the_formula(row, with_s):
    """In float64, the gradient by central differences; stacks are sums over matrices,
    layers with and without `s` may be mixed."""
    other = with_s or row.needs_s
    layers = [arrays(0, with_s), arrays(1, with_s, (2,)), arrays(2, other, (2, 1))]
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, layers)
        evaluate = jax.jit(jax.value_and_grad(lambda layers: penalty(row, layers)))
        value, gradient = evaluate(inputs)
        assert value.dtype == jnp.float64 and value.shape == ()
        np.testing.assert_allclose(value, reference(row, layers), rtol=1e-12)
        for layer, found in zip(layers, gradient, strict=True):
            for name, array in layer.items():
                expected = np.zeros_like(array)
                for index in np.ndindex(array.shape):
                    keep, ends = array[index], []
                    for nudge in (1e-5, -1e-5):
                        array[index] = keep + nudge
                        ends.append(reference(row, [layer]))
                    array[index] = keep
                    expected[index] = (ends[0] - ends[1]) / 2e-5
                error = np.linalg.norm(found[name] - expected)
                assert error <= 1e-7 * max(np.linalg.norm(expected), 1e-2), name


@pytest.mark.parametrize(("row", "with_s"), CASES)
def test_value_is_a_float32_scalar_and_layers_without_columns_are_nothing(row, with_s):
    """With a traced step as with a plain one, and beside a layer of rank 0."""
    layer = single(arrays(0, with_s))
    empty = Factors(**single(arrays(0, with_s, sizes=(4, 0, 2))))
    factors = {"0": Factors(**layer)}
    chosen = row.make(factors)
    value = chosen(factors, 0)
    assert value.dtype == jnp.float32 and value.shape == ()
    traced = jax.jit(lambda step: chosen({**factors, "empty": empty}, step))(0)
    np.testing.assert_allclose(traced, value, rtol=1e-6)
    np.testing.assert_allclose(value, reference(row, [arrays(0, with_s)]), rtol=1e-5)
    alone = row.make()({"empty": empty}, 0)
    assert alone == 0 and alone.shape == ()


@pytest.mark.parametrize("zeros", [slice(None), slice(1, None), slice(0, 2)])
@pytest.mark.parametrize(("row", "with_s"), CASES)
def test_gradients_are_finite_where_columns_are_zero(row, with_s, zeros):
    """Zero tails, zero heads, and factors that are zero altogether: no NaN, no push."""
    layer = single(arrays(0, with_s))
    layer["u"] = layer["u"].at[:, zeros].set(0)
    layer["v"] = layer["v"].at[zeros].set(0)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: penalty(row, [x])))(layer)
    assert np.isfinite(value)
    for name, part in gradient.items():
        assert np.all(np.isfinite(part)), name
    np.testing.assert_array_equal(gradient["u"][:, zeros], 0)
    np.testing.assert_array_equal(gradient["v"][zeros], 0)


@pytest.mark.parametrize(("row", "with_s"), CASES)
def test_gradients_are_finite_in_corners(row, with_s):
    """Equal singular values, one side zero, scales zero, and tiny or huge factors."""
    eye = single({"u": np.eye(3), "v": np.eye(3), "s": np.ones(3)})
    one_side = single(arrays(0, True)) | {"u": jnp.zeros((4, 3))}
    no_scale = single(arrays(0, True)) | {"s": jnp.zeros(3)}
    tiny = jax.tree.map(lambda x: 1e-12 * x, single(arrays(0, True)))
    huge = jax.tree.map(lambda x: 1e4 * x, single(arrays(0, True)))
    evaluate = jax.jit(jax.value_and_grad(lambda x: penalty(row, [x])))
    for layer in (eye, one_side, no_scale, tiny, huge):
        layer = layer if with_s else {"u": layer["u"], "v": layer["v"]}
        value, gradient = evaluate(layer)
        assert np.isfinite(value)
        for name, part in gradient.items():
            assert np.all(np.isfinite(part)), name


@pytest.mark.parametrize(("row", "with_s"), CASES)
def test_a_nan_is_not_swallowed(row, with_s):
    """A run that has gone wrong must show it in its penalties."""
    layer = single(arrays(0, with_s))
    layer = {name: x.at[(0,) * x.ndim].set(np.nan) for name, x in layer.items()}
    assert np.isnan(penalty(row, [layer]))


def test_all_allocated_columns_count_and_no_others(row):
    """Masked columns are penalized, so that a penalty can shrink them; cut ones are
    not."""
    parts = single(arrays(0, True))
    matrix = jnp.asarray(np.float32(np.random.default_rng(1).normal(size=(4, 3))))
    one = Factors.from_matrix(matrix, 3, with_s=row.needs_s)
    one.u.set_value(one.u[...] + 0.1 * parts["u"])
    chosen = row.make(["0"])
    whole = chosen({"0": one}, 0)
    one.set_rank(1)
    assert chosen({"0": one}, 0) == whole > 0
    one.cut(1)
    present = {n: x for n, x in zip("usv", one.arrays(), strict=True) if x is not None}
    expected = reference(row, [jax.tree.map(np.float64, present)])
    np.testing.assert_allclose(chosen({"0": one}, 0), expected, rtol=1e-6, atol=1e-6)
    one.cut(0)
    assert row.make()({"0": one}, 0) == 0


def test_a_model_without_factors_costs_nothing(row):
    """The sum over no layers is 0, a scalar."""
    value = row.make()({}, 0)
    assert value == 0 and jnp.shape(value) == ()


def test_negative_weights_are_refused(row):
    """A negative weight would reward large columns."""
    with pytest.raises(ValueError, match="weight: must be >= 0, got -1"):
        row.make(weight=-1)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.needs_s])
def test_penalties_of_scales_need_scales(name):
    """All layers without are named, with the rule and the fix."""
    layers = {
        "in": Factors(**single(arrays(0, False))),
        "mid": Factors(**single(arrays(0, True))),
        "out": Factors(**single(arrays(1, False))),
    }
    message = rf'in, out: penalty {name} needs .* Set "with_s": true in rank_rules'
    with pytest.raises(ValueError, match=message):
        PENALTIES[name](weight=1)(layers, 0)


BAD_ARGUMENTS = [
    ("modified_stable_rank", {"target_ranks": {}, "power": 3}, "power: must be 1 or 2"),
    (
        "modified_stable_rank",
        {"target_ranks": {}, "every_steps": 0},
        "every_steps: .*0",
    ),
    ("stable_rank", {"every_steps": 0}, "every_steps: must be >= 1, got 0"),
    ("funnel", {"start": 0, "end": 1, "anneal_steps": 1}, "start: must be > 0, got 0"),
    ("funnel", {"start": 1, "end": -2, "anneal_steps": 1}, "end: must be > 0, got -2"),
    ("funnel", {"start": 1, "end": 1, "anneal_steps": 0}, "anneal_steps: .*got 0"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name, arguments, message):
    """In the factory, before any step."""
    with pytest.raises(ValueError, match=message):
        PENALTIES[name](weight=1, **arguments)


# Golden values and identities


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
        value = PENALTIES[name](weight=1, **arguments)({"": Factors(**parts)}, 0)
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-9)


def test_orthogonality_of_orthonormal_columns_and_of_twice_them():
    """0 and 9 / 16 = 0.5625 for each factor, tall or wide; `s` does not count."""
    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 16)))
    chosen, s = penalties.orthogonality(weight=1), np.full(16, 5.0)

    def value(u, v) -> float:
        return float(chosen({"": Factors(**single({"u": u, "s": s, "v": v}))}, 0))

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
        return penalties.frobenius_decay(weight=WEIGHT)({"": Factors(**parts)}, 0)

    found, expected = (jax.grad(f)(parts) for f in (decay, through_product))
    for name in parts:
        assert relative_error(found[name], expected[name]) <= 1e-5, name
    u, s, v = matrices(arrays(0, with_s, sizes=sizes))[0]
    by_hand = WEIGHT * product(u, s, v) @ v.T * (1 if s is None else np.abs(s))
    assert relative_error(found["u"], by_hand) <= 1e-5


def product_of(parts) -> jax.Array:
    scale = jnp.abs(parts["s"])[None] if "s" in parts else 1
    return (parts["u"] * scale) @ parts["v"]


@pytest.mark.parametrize("scale", [1e-3, 7.0])
@pytest.mark.parametrize(
    "name", ["hoyer", "hoyer_square", "stable_rank", "modified_stable_rank"]
)
def test_the_scale_does_not_matter(name, scale):
    """Of s for Hoyer's, of the product for the stable ranks."""
    row = next(row for row in ROWS if row.name == name)
    layer = single(arrays(0, True))
    scaled = layer | {"s": scale * layer["s"]}
    np.testing.assert_allclose(penalty(row, [layer]), penalty(row, [scaled]), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["hoyer", "hoyer_square", "stable_rank", "modified_stable_rank"]
)
def test_tiny_matrices_of_a_stack_count_as_their_neighbours(name):
    """Squares of 1e-25 vanish in float32; each matrix is taken at its own scale."""
    row = next(row for row in ROWS if row.name == name)
    layer = single(arrays(0, True))
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), layer)
    stack["s"] = stack["s"] * jnp.array([[1], [1e-25]])
    np.testing.assert_allclose(
        penalty(row, [stack]), 2 * penalty(row, [layer]), rtol=1e-5
    )


def test_nuclear_bounds_the_nuclear_norm():
    """More than the sum of the singular values, unless the factors are balanced."""
    for with_s in (False, True):
        parts = arrays(0, with_s)
        value = penalty(ROWS[-3], [single(parts)])
        assert ROWS[-3].name == "nuclear"
        assert value > 1.01 * WEIGHT * spectrum(*matrices(parts)[0]).sum()
        one = Factors.from_matrix(
            jnp.float32(product(*matrices(parts)[0])), 2, with_s=with_s
        )
        value = penalties.nuclear(weight=WEIGHT)({"": one}, 0)
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
        value, found = jax.value_and_grad(lambda x: chosen({"": Factors(**x)}, 0))(
            inputs
        )
        np.testing.assert_allclose(value, tail / head, rtol=1e-12)
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= 1e-10, name


def test_stacked_targets_are_one_for_each_matrix():
    """Nested lists in the stack's shape, or one number for all."""
    parts = arrays(0, False, (2, 2), sizes=(5, 4, 6))
    factors = {"a": Factors(**single(parts))}
    for targets in ([[1, 2], [3, 4]], 2):
        chosen = penalties.modified_stable_rank(weight=1, target_ranks={"a": targets})
        flat = np.broadcast_to(targets, (2, 2)).ravel()
        expected = sum(
            numpy_modified(*one, target)
            for one, target in zip(matrices(parts), flat, strict=True)
        )
        np.testing.assert_allclose(chosen(factors, 0), expected, rtol=1e-5)


def test_layers_without_a_target_are_free():
    """Only what truncation will cut is penalized."""
    factors = {n: Factors(**single(arrays(int(n), False))) for n in "01"}
    chosen = penalties.modified_stable_rank(weight=1, target_ranks={"1": 1})
    expected = numpy_modified(*matrices(arrays(1, False))[0])
    np.testing.assert_allclose(chosen(factors, 0), expected, rtol=1e-5)


def test_bad_targets_are_refused_all_at_once():
    """Unknown paths, above the allocated rank, below 1, fractions, wrong nesting."""
    factors = {n: Factors(**single(arrays(0, False))) for n in "abcd"}
    factors["e"] = Factors(**single(arrays(0, False, (2,))))
    targets = {"a": 4, "b": 0, "c": 1.5, "d": [1, 1], "e": [1, [2]], "nowhere": 1}
    chosen = penalties.modified_stable_rank(weight=1, target_ranks=targets)
    with pytest.raises(ValueError, match="target_ranks") as error:
        chosen(factors, 0)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    for line, path in zip(lines, targets, strict=True):
        assert f": {path}: must be" in line
    assert "in [1, 3], got 4" in lines[0] and "leave the path out" in lines[0]
    assert "shape (2,)" in lines[4]
    assert "['a', 'b', 'c', 'd', 'e']" in lines[5]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("stable_rank", {}), ("modified_stable_rank", {"target_ranks": {"": 1}})],
)
def test_every_few_steps_have_the_same_mean(name, arguments):
    """Value and gradient, n-fold at steps divisible by n and zero elsewhere."""
    parts = single(arrays(0, True))

    def evaluate(every_steps: int, step):
        chosen = PENALTIES[name](weight=1, every_steps=every_steps, **arguments)
        return jax.value_and_grad(lambda x: chosen({"": Factors(**x)}, step))(parts)

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
    factors = {"": Factors(**single(parts))}
    expected = numpy_funnel(*matrices(parts)[0], c)
    np.testing.assert_allclose(chosen(factors, step), expected, rtol=1e-5)
    traced = jax.jit(lambda step: chosen(factors, step))(jnp.int32(step))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_the_lasso_pushes_later_columns_harder():
    """Column b is in b groups: of equal columns the last has the largest gradient.

    Which a plain group lasso does not do.
    """
    layer = {"u": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
    for row, ordered in zip(ROWS[:2], (True, False), strict=True):
        push = jax.grad(lambda x, row=row: penalty(row, [x]))(layer)["u"][0]
        assert np.all(np.diff(push) > 0.01) if ordered else np.ptp(push) < 1e-6


# Projections


def project(parts, limit: float, step: int = 0, **options) -> dict[str, np.ndarray]:
    """The arrays after stable-rank normalization, in jit."""

    @jax.jit
    def run(parts, step):
        one = Factors(**parts)
        stable_rank_normalization(stable_rank=limit, **options)({"": one}, step)
        return {n: x for n, x in zip("usv", one.arrays(), strict=True) if n in parts}

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
    with pytest.raises(ValueError, match="a/b: .*middle factors; canonicalize first"):
        stable_rank_normalization(stable_rank=2)({"a/b": deep}, 0)
