"""Folds against index-by-index definitions and a convolution done pixel by pixel."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import convolve, relative_error

from lowrank_jax import folds

FOLDS = {
    "linear": folds.linear_fold(3, 4),
    "general": folds.general_fold((), (2, 3), (4, 5)),
    "general, batch axes": folds.general_fold((2, 3), (4,), (5, 2)),
    "einsum": folds.einsum_fold("bti,ihd->bthd", (6, 2, 3)),
    "einsum, mixed order": folds.einsum_fold("bhi,oihd->bhod", (5, 3, 2, 4)),
    **{
        f"conv, scheme {scheme}, groups {groups}": folds.conv_fold(
            (3, 2), 4, 6, scheme=scheme, groups=groups
        )
        for scheme, groups in itertools.product(range(4), (1, 2))
    },
    "conv 1-D": folds.conv_fold((3,), 2, 4, scheme=3),
    "conv 3-D": folds.conv_fold((3, 2, 4), 2, 4, groups=2),
}


def counting(*shape: int) -> np.ndarray:
    """An array whose entries are all different."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_kernel_and_matrix_are_one_to_one(fold, lead):
    """`to_kernel` undoes `to_matrix`, whatever axes stand in front."""
    kernel = counting(*lead, *fold.kernel_shape)
    matrix = fold.to_matrix(jnp.asarray(kernel))
    assert matrix.shape == (
        *lead,
        *fold.stack_shape,
        fold.input_size,
        fold.output_size,
    )
    assert fold.full_rank == min(matrix.shape[-2:])
    np.testing.assert_array_equal(fold.to_kernel(matrix), kernel)
    if lead:  # each of the stacked kernels by itself
        first = fold.to_matrix(jnp.asarray(kernel[(0,) * len(lead)]))
        np.testing.assert_array_equal(matrix[(0,) * len(lead)], first)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", range(4))
def test_conv_matrices_are_those_of_the_table(scheme, groups):
    """Rows and columns by index, as the module's table has them; a matrix per group."""
    k1, k2, c, f = 3, 2, 4 // groups, 6 // groups
    fold = folds.conv_fold((k1, k2), 4, 6, scheme=scheme, groups=groups)
    kernel = counting(k1, k2, c, groups * f)
    matrices = np.asarray(fold.to_matrix(jnp.asarray(kernel)))
    matrices = matrices.reshape(groups, *matrices.shape[-2:])
    for g, a, b, i, o in itertools.product(*map(range, (groups, k1, k2, c, f))):
        row, column = {
            0: ((a * k2 + b) * c + i, o),
            1: (b * c + i, a * f + o),
            2: (a * c + i, b * f + o),
            3: (i, (a * k2 + b) * f + o),
        }[scheme]
        assert matrices[g, row, column] == kernel[a, b, i, g * f + o]


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", range(4))
def test_two_convolutions_equal_one(scheme, groups, strides):
    """Each with stride and padding of its own axes, on odd sizes (methods.md 0.1)."""
    fold = folds.conv_fold((3, 2), 4, 6, scheme=scheme, groups=groups)
    stack = (groups,) if groups > 1 else ()
    u = random(*stack, fold.input_size, 3)
    v = random(*stack, 3, fold.output_size, seed=1)
    images, padding = random(2, 7, 5, 4, seed=2), ((1, 1), (0, 1))
    first, second = (
        fold.first_kernel(jnp.asarray(u)),
        fold.second_kernel(jnp.asarray(v)),
    )
    sizes = [size if axis in fold.first_axes else 1 for axis, size in enumerate((3, 2))]
    assert first.shape == (*sizes, 4 // groups, groups * 3)
    assert second.shape == (3 // sizes[0], 2 // sizes[1], 3, 6)
    once = convolve(
        images,
        fold.to_kernel(u @ v),
        strides=strides,
        padding=padding,
        groups=groups,
    )
    hidden = images
    for kernel, axes in ((first, fold.first_axes), (second, fold.second_axes)):
        hidden = convolve(
            hidden,
            kernel,
            strides=[strides[x] if x in axes else 1 for x in (0, 1)],
            padding=[padding[x] if x in axes else (0, 0) for x in (0, 1)],
            groups=groups,
        )
    assert relative_error(hidden, once) <= 1e-6


def test_a_linear_kernel_is_its_matrix():
    kernel = random(3, 4)
    matrix = folds.linear_fold(3, 4).to_matrix(jnp.asarray(kernel))
    np.testing.assert_array_equal(matrix, kernel)


@pytest.mark.parametrize(
    ("equation", "shape", "stack", "inputs", "outputs"),
    [
        ("bi,io->bo", (3, 4), (), (3,), (4,)),
        ("bti, ihd -> bthd", (6, 2, 3), (), (6,), (2, 3)),
        ("bthd,hdo->bto", (2, 3, 6), (), (2, 3), (6,)),
        ("...i,io->...o", (3, 4), (), (3,), (4,)),
        ("bhi,hio->bho", (2, 3, 4), (2,), (3,), (4,)),
        ("bhi,oih->bho", (4, 3, 2), (2,), (3,), (4,)),
    ],
)
def test_einsum_axes_are_sorted_by_where_they_occur(
    equation, shape, stack, inputs, outputs
):
    """In input and output: stack; in the input: rows; in the output: columns."""
    fold = folds.einsum_fold(equation, shape)
    assert (fold.stack_shape, fold.input_shape, fold.output_shape) == (
        stack,
        inputs,
        outputs,
    )


def test_an_einsum_matrix_multiplies_as_the_einsum_does():
    """Rows and columns run in the order of the kernel's axes."""
    kernel, inputs = random(5, 3, 2, 4), random(6, 2, 3, seed=1)
    fold = folds.einsum_fold("bhi,oihd->bhod", kernel.shape)
    outputs = np.einsum("bhi,hio->bho", inputs, fold.to_matrix(jnp.asarray(kernel)))
    expected = np.einsum("bhi,oihd->bhod", inputs, kernel)
    assert relative_error(outputs.reshape(expected.shape), expected) <= 1e-6


@pytest.mark.parametrize(
    ("equation", "shape", "message"),
    [
        ("bi,ij->bi", (3, 4), "named once and be in the input or the output, got 'j'"),
        ("bi,ii->bi", (3, 3), "named once and be in the input or the output, got 'i'"),
        ("bi,...io->b...o", (2, 3, 4), "got '.'"),
        ("bi,i->bi", (3,), "an axis that is contracted and one that is new"),
        ("bi,i->b", (3,), "an axis that is contracted and one that is new"),
        ("b,o->bo", (3,), "an axis that is contracted and one that is new"),
    ],
)
def test_an_einsum_that_is_no_matrix_is_an_error(equation, shape, message):
    with pytest.raises(ValueError, match=f"Keep this layer dense|{message}") as error:
        folds.einsum_fold(equation, shape)
    assert message in str(error.value) and repr(equation) in str(error.value)


@pytest.mark.parametrize(
    ("kernel_size", "scheme"), [((3,), 1), ((3,), 2), ((3, 3, 3), 2), ((3, 3), 4)]
)
def test_a_scheme_that_does_not_exist_is_an_error(kernel_size, scheme):
    with pytest.raises(ValueError, match=rf"got {scheme} for kernel size \(3,"):
        folds.conv_fold(kernel_size, 2, 4, scheme=scheme)


def test_a_kernel_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"must end in \(3, 4\), got \(4, 3\)"):
        folds.linear_fold(3, 4).to_matrix(jnp.ones((4, 3)))
