"""Tokenizers lose nothing, learn of the training text alone, and travel as JSON."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_form

from lowrank_jax.errors import UserError
from train.data import byte_pairs, tokenizers

TRAIN = (
    "Der alte Mann saß am Fluß, und der alte Hund saß am Tor. 🎉\n"
    "The old man sat by the river, and the old dog sat by the gate.\n"
) * 4
ROOT = Path(__file__).resolve().parents[2]


def train(name, texts=(TRAIN,), reserved=0, **args):
    spec = {"name": name, "args": args}
    return tokenizers.build(spec, list(texts), reserved=reserved)


@pytest.fixture(
    scope="module",
    params=[("characters", {}, 0), ("byte_pairs", {"vocab_size": 300}, 3)],
    ids=["characters", "byte_pairs"],
)
def tokenizer(request):
    name, args, reserved = request.param
    return train(name, reserved=reserved, **args)


def texts_of(tokenizer):
    """Any text for byte pairs, else of characters that were trained on."""
    is_bytes = isinstance(tokenizer, byte_pairs.BytePairs)
    any_text = st.text(st.characters(codec="utf-8"))
    return any_text if is_bytes else st.text(st.sampled_from(TRAIN))


@settings(deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_every_character_is_counted(tokenizer, data):
    some = data.draw(texts_of(tokenizer))
    ids = tokenizer.encode(some)
    assert tokenizer.decode(ids) == some
    assert tokenizer.lengths()[ids].sum() == len(some)
    assert ((ids >= tokenizer.reserved) & (ids < tokenizer.size)).all()


def test_one_text_and_many_have_the_same_tokens(tokenizer):
    lines = [*TRAIN.splitlines(), "", "a"]
    for one, of_many in zip(lines, tokenizer.encode_batch(lines), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), of_many)
    assert tokenizer.encode_batch([]) == []


def test_facts_rebuild_it(tokenizer):
    facts = tokenizer.to_facts()
    plain = json.loads(json.dumps(facts))
    assert plain == facts
    again = tokenizers.from_facts(plain)
    assert again == tokenizer
    assert (again.size, again.reserved) == (tokenizer.size, tokenizer.reserved)
    np.testing.assert_array_equal(again.encode(TRAIN), tokenizer.encode(TRAIN))
    np.testing.assert_array_equal(again.lengths(), tokenizer.lengths())


def test_ids_are_as_small_as_they_can_be():
    """0, 1, ... in the order of characters; special ones first."""
    tokenizer = train("characters", ["banana"], reserved=2)
    assert tokenizer.encode("ban").tolist() == [3, 2, 4]
    assert tokenizer.encode("ban").dtype == np.uint8
    assert tokenizer.size == 5
    assert tokenizer.lengths().tolist() == [0, 0, 1, 1, 1]
    assert tokenizer.decode([1, 3, 2, 0, 4]) == "ban"
    assert train("byte_pairs", vocab_size=256).encode("é").dtype == np.uint8
    large = train("byte_pairs", vocab_size=300).encode("é")
    assert large.dtype == np.uint16


def test_byte_pairs_by_hand():
    """Bytes by value, then the commonest pair, then the next."""
    tokenizer = train("byte_pairs", ["abab abab cab"], vocab_size=261, reserved=3)
    a, b, c = b"abc"
    ab = 256
    assert tokenizer.to_facts() == {
        "name": "byte_pairs",
        "merges": [[a, b], [ab, ab]],
        "reserved": 3,
    }
    assert tokenizer.encode("cab").tolist() == [3 + c, 3 + ab]


def test_only_the_training_text_is_learned():
    """What only the test has is unknown to characters, and not merged in byte pairs."""
    test = "zyx zyx zyx zyx zyx"
    with pytest.raises(UserError, match=r"got 'x', 'y', 'z', first at 0\."):
        train("characters", ["a b"]).encode(test)
    alone = train("byte_pairs", vocab_size=320)
    both = train("byte_pairs", [TRAIN, test], vocab_size=320)
    zy = tuple(b"zy"), tuple(b"yx")
    assert not set(zy) & set(alone.merges)
    assert set(zy) & set(both.merges)  # it would have been
    assert alone.decode(alone.encode(test)) == test


def test_a_merge_may_make_bytes_that_are_there():
    """(a, bc) and (ab, c) make one token; the ids that follow do not shift."""
    a, b, c, ab, bc, abc, abcc = *b"abc", 256, 257, 258, 259
    merges = [[a, b], [b, c], [ab, c], [a, bc], [abc, c]]
    tokenizer = byte_pairs.BytePairs(tuple(map(tuple, merges)))
    assert tokenizer.size == abcc + 1
    assert tokenizer.encode("abcc").tolist() == [abcc]
    assert tokenizer.decode([abcc, bc]) == "abccbc"
    facts = {"name": "byte_pairs", "merges": merges, "reserved": 0}
    assert tokenizers.from_facts(facts) == tokenizer


@pytest.mark.parametrize("some", [TRAIN, "a  b\n\n c d e' s 1 2 _ x", "no-space" * 50])
def test_long_texts_are_cut_where_it_shows_nowhere(monkeypatch, some):
    tokenizer = train("byte_pairs", vocab_size=320)
    whole = tokenizer.encode(some)
    monkeypatch.setattr(byte_pairs, "_PIECE", 3)
    assert "".join(byte_pairs._pieces(some)) == some
    np.testing.assert_array_equal(tokenizer.encode(some), whole)
    assert train("byte_pairs", vocab_size=320) == tokenizer


def test_bytes_that_are_no_utf8_are_shown():
    """As a model may write them; nothing is raised in the midst of a text."""
    tokenizer = train("byte_pairs", vocab_size=256)
    assert tokenizer.decode([0xC3, ord("a")]) == "\ufffda"


SAME = """
import json, random
from train.data import tokenizers
letters = random.Random(0)
sizes = [letters.randint(2, 9) for _ in range(900)]
words = ["".join(letters.choices("abcdefgh", k=size)) for size in sizes]
texts = [" ".join(letters.choices(words, k=20)) for _ in range(400)]
spec = {"name": "byte_pairs", "args": {"vocab_size": 900}}
print(json.dumps(tokenizers.build(spec, texts).to_facts()))
"""


@pytest.mark.slow
def test_training_is_the_same_in_every_process():
    """With threads and without, whatever the seed of hashing."""
    found = set()
    for parallel, hash_seed in (("true", "1"), ("false", "2")):
        variables = {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", SAME],
            env={**os.environ, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    (facts,) = found
    assert len(json.loads(facts)["merges"]) == 900 - 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: train("words"),
            "tokenizer.name: must be a tokenizer, one of 'byte_pairs'",
        ),
        (lambda: train("os:system"), "tokenizer.name: must be a tokenizer"),
        (lambda: train("byte_pairs"), "tokenizer: args: .*'vocab_size'"),
        (
            lambda: train("byte_pairs", vocab_size=255),
            r"in \[256, 65,536\], .* got 255",
        ),
        (
            lambda: train("byte_pairs", vocab_size=258, reserved=3),
            r"in \[259, 65,536\]",
        ),
        (lambda: train("byte_pairs", vocab_size=65_537), "got 65,537"),
        (lambda: train("byte_pairs", vocab_size="8k"), "vocab_size: must be of type"),
        (
            lambda: train("characters", [map(chr, range(0x10000, 0x20001))]),
            "may hold 65,536 different characters, got 65,537",
        ),
        (
            lambda: train("characters").decode([0, 99, -1]),
            r"\[0, \d+\].*got \[-1, 99\]",
        ),
        (lambda: train("byte_pairs", vocab_size=256).decode([256]), r"got \[256\]"),
        (
            lambda: train("byte_pairs", vocab_size=256).encode("a\udcffb"),
            r"must be Unicode, got '\\udcff' at 1",
        ),
        (lambda: train("characters").encode("\udcff"), r"got '\\udcff', first at 0"),
    ],
)
def test_mistakes_say_what_to_do(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    check_form(str(caught.value))


DOUBLED = [[97, 97]] + [[n, n] for n in range(256, 300)]
DAMAGED = {
    "no mapping": ["byte_pairs"],
    "nothing": None,
    "no name": {"merges": []},
    "a name that is a list": {"name": ["byte_pairs"]},
    "another name": {"name": "os:system", "args": {}},
    "no merges": {"name": "byte_pairs", "reserved": 0},
    "another key": {"name": "characters", "characters": "a", "reserved": 0, "x": 1},
    "reserved is a truth value": {"reserved": True},
    "reserved below 0": {"reserved": -1},
    "reserved beyond all": {"reserved": 2**16},
    "no room for bytes": {"reserved": 2**16 - 255, "merges": []},
    "merges of text": {"merges": ["a b"]},
    "a mapping of merges": {"merges": {"a": "b"}},
    "a merge of three": {"merges": [[97, 98, 99]]},
    "a merge of fractions": {"merges": [[97.0, 98.0]]},
    "a merge of truth values": {"merges": [[True, False]]},
    "a merge of itself": {"merges": [[256, 97]]},
    "a merge of what comes later": {"merges": [[97, 257], [97, 98]]},
    "a merge below 0": {"merges": [[-1, 97]]},
    "a merge of a giant": {"merges": [[10**30, 97]]},
    "a merge twice": {"merges": [[97, 98], [97, 98]]},
    "tokens that double": {"merges": DOUBLED},
    "too many": {"merges": [[n // 256, n % 256] for n in range(2**16)]},
    "no characters": {"characters": ""},
    "characters in a list": {"characters": ["a", "b"]},
    "a character twice": {"characters": "aab"},
    "characters in disorder": {"characters": "ba"},
    "half a character": {"characters": "a\ud800"},
    "more characters than ids": {
        "characters": "".join(map(chr, range(0x10000, 0x20001)))
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_facts_are_refused(case):
    facts = copy.deepcopy(DAMAGED[case])
    if isinstance(facts, dict) and "name" not in facts and case != "no name":
        rest = {"characters": "ab"} if "characters" in facts else {"merges": []}
        name = "characters" if "characters" in facts else "byte_pairs"
        facts = {"name": name, "reserved": 0, **rest, **facts}
    with pytest.raises(UserError) as caught:
        tokenizers.from_facts(facts)
    message = str(caught.value)
    assert message.startswith("tokenizer: ") and len(message) < 400
    check_form(message)
