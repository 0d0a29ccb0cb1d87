"""Families: the ranks of a size, on corners, between them, and after a cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import families
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Limits, Ranks, at_fraction, fraction_of, lowest

WHOLE = {"a": 16, "b": 0, "c": [4, 8]}
FAMILY = [(0.5, {"a": 12, "b": 0, "c": [1, 6]}), (0.25, {"a": 3, "b": 0, "c": [1, 1]})]
LIMITS = {path: Limits(rank, int(np.max(rank))) for path, rank in WHOLE.items()}
SIZES = st.floats(1e-3, 1.0)


def not_above(small: Ranks, large: Ranks) -> bool:
    return all(np.all(np.less_equal(small[path], large[path])) for path in large)


@settings(deadline=None)
@given(SIZES)
def test_without_a_family_a_size_is_a_fraction_of_every_rank(size):
    assert families.member((), WHOLE, size) == at_fraction(WHOLE, size)


def test_corners_are_the_members_and_the_whole():
    for fraction, ranks in FAMILY:
        assert families.member(FAMILY, WHOLE, fraction) == ranks
    assert families.member(FAMILY, WHOLE, 1.0) == WHOLE


def test_ranks_lie_on_the_line_between_two_members():
    """By hand: 12 + (16 - 12) / 2, 6 + (8 - 6) / 2; 3 / 2 and 1 / 2 rounded up."""
    assert families.member(FAMILY, WHOLE, 0.75) == {"a": 14, "b": 0, "c": [3, 7]}
    assert families.member(FAMILY, WHOLE, 0.125) == {"a": 2, "b": 0, "c": [1, 1]}
    assert families.member(FAMILY, WHOLE, 1e-6) == {"a": 1, "b": 0, "c": [1, 1]}


def test_a_family_of_fractions_is_no_other_than_none():
    """Its corners on a line through nothing; up to the rounding of the corners."""
    family = [(0.5, at_fraction(WHOLE, 0.5)), (0.25, at_fraction(WHOLE, 0.25))]
    for part in range(1, 17):
        assert families.member(family, WHOLE, part / 16)["a"] == fraction_of(
            part / 16, 16
        )


@settings(deadline=None)
@given(SIZES, SIZES)
def test_a_smaller_size_is_nested_in_a_larger(first, second):
    small, large = sorted((first, second))
    found = [families.member(FAMILY, WHOLE, size) for size in (small, large)]
    assert not_above(found[0], found[1]) and not_above(found[1], WHOLE)
    assert all(min(np.ravel(found[0][path])) >= 1 for path in ("a", "c"))


@settings(deadline=None)
@given(SIZES)
def test_what_was_cut_keeps_what_it_has(size):
    """A layer below the family's rank is no obstacle to the others."""
    cut = {"a": 2, "b": 0, "c": [4, 5]}
    found = families.member(FAMILY, cut, size)
    assert not_above(found, cut)
    if size == 0.5:
        assert found == {"a": 2, "b": 0, "c": [1, 5]}
    lowered = families.lowered(FAMILY[0][1], {p: Limits(r, 8) for p, r in cut.items()})
    assert lowered == {p: lowest(FAMILY[0][1][p], rank) for p, rank in cut.items()}


def test_a_family_is_read_from_json_or_refused():
    assert families.of_pairs([[0.5, {"a": 1}]]) == [(0.5, {"a": 1})]
    assert families.of_pairs(()) == []
    for wrong in (7, [7], [[0.5]], [["a", {}]], [[0.5, [1]]], {"a": 1}):
        with pytest.raises(UserError, match="^family: must hold pairs of a fraction"):
            families.of_pairs(wrong)


def test_what_is_no_family_is_refused_by_name():
    families.check(FAMILY, LIMITS)
    families.check((), LIMITS)
    (half, ranks), quarter = FAMILY
    for wrong, message in (
        ([(1.0, ranks)], r"family: fractions must be in \(0, 1\)"),
        ([(half, ranks)] * 2, r"none twice, got \[0.5, 0.5\]"),
        ([(half, {"a": 12})], r"^family at 0.5: must name all .* none of \['b', 'c'\]"),
        ([(half, {**ranks, "a": 17})], r"^family at 0.5: a: rank must be in \[0, 16"),
        ([(half, {**ranks, "x": 1})], "^family at 0.5: paths: must name low-rank"),
        ([(0.25, ranks), (0.5, quarter[1])], r"must be nested, .* at \['a', 'c'\]"),
    ):
        with pytest.raises(UserError, match=message):
            families.check(wrong, LIMITS)
