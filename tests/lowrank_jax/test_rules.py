"""Ordered rules: first match, whole path, every mistake named."""

import pytest

from lowrank_jax.rules import match_rules


def test_first_match_decides():
    """Order is the precedence; values may be anything, None and 0 included."""
    rules = [("a/.*", None), ("a/b|c", 0), (".*", "rest")]
    assert match_rules(rules, ["a/b", "c", "d"]) == {"a/b": None, "c": 0, "d": "rest"}


def test_patterns_match_the_whole_path():
    """A prefix or a piece of a path is no match."""
    rules = [("head", 1), (".*", 2)]
    found = match_rules(rules, ["head", "head/0", "my/head", "heads"])
    assert found == {"head": 1, "head/0": 2, "my/head": 2, "heads": 2}


def test_the_empty_path_is_a_path():
    """A model that is itself a layer has the path ""."""
    assert match_rules([("", 1)], [""]) == {"": 1}


def test_no_paths_and_no_rules_is_nothing():
    assert match_rules([], []) == {}


def test_any_alias_may_match_but_rules_keep_their_order():
    """A shared module is decided by the first rule that matches any of its names."""
    names = {"decoder/head": ["decoder/head", "encoder/embed"], "body": ["body"]}
    rules = [("encoder/.*", 1), ("decoder/.*", 2), ("body", 3)]
    assert match_rules(rules, names) == {"decoder/head": 1, "body": 3}
    rules = [("decoder/.*", 2), ("encoder/.*", 1), ("body", 3)]
    assert match_rules(rules, names) == {"decoder/head": 2, "body": 3}


def test_a_rule_that_only_follows_others_is_used():
    """A rule whose paths were all decided before is no error: it does match."""
    assert match_rules([("a", 1), ("a|b", 2), ("b", 3)], ["a", "b"]) == {"a": 1, "b": 2}


def test_uncovered_paths_are_all_named():
    with pytest.raises(ValueError, match=r"^every layer.*\['b', 'c'\]") as error:
        match_rules([("a", 1)], ["a", "b", "c"])
    assert "'a'" not in str(error.value)


def test_unused_rules_are_all_named():
    """With what there is to match, so that the typing mistake is seen."""
    with pytest.raises(
        ValueError, match=r"no match for \['x', 'boddy/\.\*'\] among \['body/0'\]"
    ):
        match_rules([("x", 1), ("boddy/.*", 1), (".*", 2)], ["body/0"])


def test_a_rule_without_any_path_is_unused():
    with pytest.raises(ValueError, match=r"no match for \['\.\*'\] among \[\]"):
        match_rules([(".*", 1)], [])


def test_a_bad_pattern_is_shown():
    with pytest.raises(
        ValueError, match=r"^a pattern must be a regular expression.*'a\('"
    ):
        match_rules([("a(", 1)], ["a"])
