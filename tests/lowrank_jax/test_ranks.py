"""Ranks outside jit: fractions, mappings, and the one check of legality."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import (
    Limits,
    at_fraction,
    at_most,
    check_active,
    check_lower,
    flatten_rank,
    fraction_of,
    largest,
    lowest,
)

LIMITS = {
    "whole": Limits(4, 4),
    "masked": Limits(2, 4),
    "stack": Limits([1, 3], 4),
    "fixed": Limits(3, 3, nested=False),
    "": Limits(2, 2),
}


@pytest.mark.parametrize("rank", [1, 7, 25, 192, 4096])
def test_fractions_are_exact(rank):
    """`k / n` of n is k in spite of floating point; never 0 of something."""
    for part in range(1, rank + 1, max(rank // 50, 1)):
        assert fraction_of(part / rank, rank) == part
    assert fraction_of(1e-12, rank) == 1 and fraction_of(0.5, 0) == 0
    with pytest.raises(UserError, match=r"\(0, 1\], got 1.5"):
        fraction_of(1.5, rank)


def test_values_and_mappings():
    assert flatten_rank([[1, 2], [3, 4]]) == [1, 2, 3, 4] and flatten_rank(5) == [5]
    assert largest([[1, 7], [3, 4]]) == 7 and largest([]) == 0
    assert lowest([1, 5], 3) == [1, 3] and lowest(4, 2) == 2
    assert at_most({"a": [1, 5], "b": 2}, 3) == {"a": [1, 3], "b": 2}
    assert at_fraction({"a": [1, 5], "b": 8}, 0.5) == {"a": [1, 3], "b": 4}


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_arrays_are_ranks_as_lists_are(array):
    """Of NumPy, and concrete ones of JAX."""
    stack = array([[1, 7], [3, 4]])
    assert flatten_rank(stack) == [1, 7, 3, 4] and flatten_rank(array(5)) == [5]
    assert largest(stack) == 7 and largest(array([], int)) == 0
    assert lowest(array([1, 5]), 3) == [1, 3]
    ranks = {"a": array([1, 5]), "b": array(8)}
    assert at_most(ranks, 3) == {"a": [1, 3], "b": 3}
    assert at_fraction(ranks, 0.5) == {"a": [1, 3], "b": 4}


LEGAL = {
    "whole": [0, 4, np.int64(3), np.asarray(2)],
    "masked": [0, 2],
    "stack": [0, 1, [1, 3], [0, 0], np.asarray([1, 2])],
    "fixed": [3],
}


@pytest.mark.parametrize(("path", "rank"), [(p, r) for p in LEGAL for r in LEGAL[p]])
def test_legal_ranks_pass(path, rank):
    check_lower({path: rank}, LIMITS)
    check_active({path: rank}, LIMITS)


REFUSED = {
    "above": ("whole", 5, r"whole: rank must be in \[0, 4\], got 5"),
    "negative": ("whole", -1, r"got -1"),
    "bool": ("whole", True, "whole number, got True"),
    "float": ("whole", 2.0, r"whole number, got 2\.0"),
    "none": ("whole", None, "got None"),
    "list": ("whole", [1], r"got \[1\]"),
    "short": ("stack", [1], r"nested lists of shape \(2,\), got \[1\]"),
    "unequal": ("stack", [[1], [1, 2]], r"shape \(2,\)"),
    "other": ("fixed", 2, "fixed: rank must be 3, the only one of its form, got 2"),
    "root": ("", 3, r"the model itself: rank must be in \[0, 2\]"),
    "unknown": ("body", 1, r"got \['body'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("check", [check_lower, check_active])
def test_illegal_ranks_are_refused_by_name(check, case):
    path, rank, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        check({path: rank}, LIMITS)


@pytest.mark.parametrize(
    ("path", "rank"), [("masked", 3), ("stack", [2, 3]), ("stack", 2)]
)
def test_no_cut_raises_a_rank_and_setting_one_may(path, rank):
    """Between the active and the allocated rank the two checks part."""
    check_active({path: rank}, LIMITS)
    with pytest.raises(UserError, match=f"{path}: .*do not come back"):
        check_lower({path: rank}, LIMITS)
    with pytest.raises(UserError, match=r"\[0, 4\].*never allocated"):
        check_active({path: np.add(rank, 3).tolist()}, LIMITS)


def test_arrays_may_have_a_rank_per_example_to_set():
    """Their extremes are what counts; a list is one rank for each matrix."""
    check_active({"whole": np.array([0, 4, 2]), "stack": np.ones((2, 5), int)}, LIMITS)
    wrong = {"whole": np.array([0, 6]), "stack": np.array([[0, 1], [-1, 2]])}
    with pytest.raises(UserError, match=r"(?s)whole: .*0 to 6.*stack: .*\[0, -1\] to"):
        check_active(wrong, LIMITS)
    with pytest.raises(UserError, match="whole number"):
        check_active({"whole": np.array([0.5, 1])}, LIMITS)
    with pytest.raises(UserError, match="whole: rank must be a whole number"):
        check_lower({"whole": np.array([1, 2])}, LIMITS)


def test_all_offenders_are_named_at_once():
    wrong = {"whole": 9, "masked": -1, "body": 1, "fixed": 1}
    with pytest.raises(UserError, match=r"(?s)body.*whole: .*masked: .*fixed: "):
        check_lower(wrong, LIMITS)
