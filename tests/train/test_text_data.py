"""Text as data sets: every target counts once, and nothing is learned of the test."""

import itertools
import json
import math
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_form

from lowrank_jax.errors import MissingFile, UserError
from train.data import pipeline, text, tokenizers
from train.data.pipeline import load_dataset
from train.data.windows import WindowSource

CHARACTERS = {"name": "characters", "args": {}}
TEXTS = {
    "train": "the cat sat on the mat, and the hat sat on the cat.\n" * 6,
    "validation": "the mat sat on a cat.\n" * 3,
    "test": "a hat, the cat and the mat.\n" * 3,
}


@pytest.fixture(scope="module")
def tfds_dir():
    """A directory with prepared text sets, or a skip."""
    shared = pathlib.Path(__file__).parents[2] / ".." / "shared" / "tfds"
    names = ("tiny_shakespeare", "multi30k")
    for candidate in (os.environ.get("TFDS_DATA_DIR"), shared):
        if candidate and all((pathlib.Path(candidate) / n).is_dir() for n in names):
            return str(candidate)
    pytest.skip(f"no prepared {' and '.join(names)} in TFDS_DATA_DIR or ../shared/tfds")


@pytest.fixture
def write(tmp_path):
    """Writes a text for each name; returns their paths."""

    def write(**contents):
        paths = {}
        for name, content in contents.items():
            path = tmp_path / f"{name}.txt"
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
            paths[name] = str(path)
        return paths

    return write


def open_windows(place, context=8, tokenizer=CHARACTERS, **args):
    args = {"text": place, "tokenizer": tokenizer, "context": context, **args}
    return load_dataset("text_windows", args=args)


@settings(deadline=None)
@given(
    size=st.integers(2, 60),
    context=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    multiple_of=st.integers(1, 3),
)
def test_evaluation_counts_every_target_once(size, context, batch_size, multiple_of):
    """Over windows side by side, the batches padded as devices need them."""
    if size <= context:
        return
    stream = np.arange(size, dtype=np.uint8)
    source = WindowSource(stream, context, context, partial=True)
    whole = pipeline.Subset(source, np.arange(len(source)))
    dataset = pipeline.Dataset("x", {}, {"test": whole})
    inputs, targets = [], []
    batches = dataset.eval_batches("test", batch_size, multiple_of=multiple_of)
    for batch in batches:
        assert batch["tokens"].shape[1] == context + 1
        assert len(batch["tokens"]) % multiple_of == 0
        for row, length, weight in zip(*batch.values(), strict=True):
            assert not row[length + 1 :].any()
            if weight:
                inputs += row[:length].tolist()
                targets += row[1 : length + 1].tolist()
            else:
                assert length == 0
    assert targets == stream[1:].tolist()
    assert inputs == stream[:-1].tolist()
    assert len(source) == math.ceil((size - 1) / context)


@settings(deadline=None)
@given(size=st.integers(2, 60), context=st.integers(1, 20), stride=st.integers(1, 9))
def test_training_windows_are_whole_and_start_at_every_stride(size, context, stride):
    if size <= context:
        return
    stream = np.arange(size, dtype=np.uint8)
    source = WindowSource(stream, context, stride, partial=False)
    starts = range(0, size - context, stride)
    batch = source.take(np.arange(len(source)))
    expected = [stream[start : start + context + 1].tolist() for start in starts]
    assert batch["tokens"].tolist() == expected
    assert batch["length"].tolist() == [context] * len(expected)
    assert batch["length"].dtype == np.int32


def test_plain_files_become_windows(write):
    dataset = open_windows(write(**TEXTS), stride=3)
    letters = sorted(set(TEXTS["train"]))
    facts = dict(dataset.facts)
    digests = facts.pop("about")["digests"]
    assert sorted(digests) == ["test", "train", "validation"]
    assert facts == {
        "arrays": {
            "tokens": {"shape": [9], "dtype": "uint8"},
            "length": {"shape": [], "dtype": "int32"},
        },
        "vocab_size": len(letters),
        "tokenizer": {
            "name": "characters",
            "characters": "".join(letters),
            "reserved": 0,
        },
    }
    assert json.loads(json.dumps(dataset.facts)) == dataset.facts
    tokenizer = tokenizers.from_facts(dataset.facts["tokenizer"])
    batch = next(dataset.train_batches(5, seed=0))
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": ((5, 9), "uint8"),
        "length": ((5,), "int32"),
    }
    for row in batch["tokens"]:
        assert tokenizer.decode(row) in TEXTS["train"]
    lengths, counted = tokenizer.lengths(), 0
    for batch in dataset.eval_batches("validation", 4):
        targets = np.arange(8) < batch["length"][:, None]
        counted += (lengths[batch["tokens"][:, 1:]] * targets).sum()
    assert counted == len(TEXTS["validation"]) - 1  # the first is no target


def test_a_digest_tells_a_split_from_others(write):
    """The same text has the same one, and each split its own."""
    before, again = (
        open_windows(write(**TEXTS)).facts["about"]["digests"] for _ in range(2)
    )
    assert again == before and len(set(before.values())) == 3
    swapped = {**TEXTS, "train": TEXTS["train"].replace("cat", "act")}
    after = open_windows(write(**swapped)).facts["about"]["digests"]
    assert {split for split in before if after[split] != before[split]} == {"train"}


def test_one_file_is_cut_into_splits(write):
    whole = "".join(chr(ord("a") + index % 26) for index in range(400))
    paths = write(file=whole)
    texts = text.read_texts(text.locate(paths, ["text"], ""))
    assert texts == {
        "train": whole[:360],
        "validation": whole[360:380],
        "test": whole[380:],
    }
    assert open_windows(paths["file"]).facts == open_windows(paths).facts
    sizes = open_windows(paths).sizes
    assert sizes == {"train": 352, "validation": 3, "test": 3}


def test_relative_paths_start_from_the_data_dir(write, tmp_path):
    names = {split: f"{split}.txt" for split in write(**TEXTS)}
    args = {"text": names, "tokenizer": CHARACTERS, "context": 4}
    dataset = load_dataset("text_windows", data_dir=str(tmp_path), args=args)
    assert dataset.sizes["train"] == len(TEXTS["train"]) - 4


def test_windows_are_a_function_of_seed_and_step(write):
    dataset = open_windows(write(**TEXTS))
    full = itertools.islice(dataset.train_batches(16, seed=3), 5, 40)
    resumed = dataset.train_batches(16, seed=3, start_step=5)
    other = dataset.train_batches(16, seed=4, start_step=5)
    for expected, got, another in zip(full, resumed, other, strict=False):
        np.testing.assert_array_equal(got["tokens"], expected["tokens"])
        assert not np.array_equal(another["tokens"], expected["tokens"])


def test_a_text_is_tokenized_once_until_it_changes(write):
    paths = write(**TEXTS)
    first, again = open_windows(paths), open_windows(paths, context=5)
    stream = first.splits["train"].source.tokens
    assert stream is again.splits["train"].source.tokens
    assert not stream.flags.writeable
    write(train=TEXTS["train"] + "longer")
    assert len(open_windows(paths).splits["train"].source.tokens) == len(stream) + 6


def test_shakespeare_is_karpathys(tfds_dir):
    spec = {"text": "tiny_shakespeare", "tokenizer": CHARACTERS, "context": 64}
    dataset = load_dataset("text_windows", data_dir=tfds_dir, args=spec)
    assert dataset.facts["vocab_size"] == 65
    assert dataset.sizes == {"train": 1_003_790, "validation": 872, "test": 872}
    row = dataset.splits["train"].source.take(np.array([0]))["tokens"][0]
    assert tokenizers.from_facts(dataset.facts["tokenizer"]).decode(row) == (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll"
    )


def test_defaults_of_a_named_set_are_written_out():
    args = {"text": "x", "tokenizer": CHARACTERS, "context": 4}
    spec = {"name": "text_windows", "args": args, "data_dir": "d", "batch_size": 3}
    done = pipeline.complete(spec, allow_imports=[])
    assert done == {**spec, "args": {**args, "stride": 1}}
    for wrong in ("data_dir", "contxt"):
        with pytest.raises(UserError, match=wrong):
            named = {**spec, "args": {**args, wrong: ""}}
            pipeline.complete(named, allow_imports=[])


def with_args(**changes):
    return lambda paths: open_windows(paths, **changes)


MISTAKES = {
    "not UTF-8": (
        {"test": "Größe".encode("latin1") * 9},
        with_args(),
        "test.txt: must be UTF-8, got byte 0xf6 at offset 2",
    ),
    "an unknown character": (
        {"test": TEXTS["test"] + "Zebra"},
        with_args(),
        "test: text: characters must be of.*'Z', 'b'",
    ),
    "no text": ({"validation": ""}, with_args(), "validation text must hold"),
    "too short": (
        {"validation": "the cat ", "test": "the"},
        with_args(),
        r"(?s)validation text: must hold.*got 8.*\n.*test text: must hold.*got 3",
    ),
    "no context": ({}, with_args(context=0, stride=-2), r"(?s)context: .*\n.*stride: "),
    "context of another type": ({}, with_args(context="8"), "context: must be of type"),
    "no such argument": ({}, with_args(step=3), r"args: must be .*'step'"),
    "no such tokenizer": (
        {},
        with_args(tokenizer={"name": "words", "args": {}}),
        "tokenizer.name: must be a tokenizer, .*characters.*'words'",
    ),
    "a tokenizer by import path": (
        {},
        with_args(tokenizer={"name": "os:system", "args": {}}),
        "tokenizer.name: must be a tokenizer",
    ),
    "no such argument of the tokenizer": (
        {},
        with_args(tokenizer={"name": "characters", "args": {"size": 3}}),
        "tokenizer: args: must be an argument of characters.*'size'",
    ),
    "reserved ids": (
        {},
        with_args(tokenizer={"name": "characters", "args": {"reserved": 3}}),
        "tokenizer: args: must not hold reserved",
    ),
    "no choice of a tokenizer": (
        {},
        with_args(tokenizer={"kind": "characters"}),
        "tokenizer: every key must be",
    ),
    "other splits": (
        {},
        lambda paths: open_windows({"train": paths["train"]}),
        r"text: must be .*\(or file alone\), got \['train'\]",
    ),
    "held out of training": (
        {},
        lambda paths: load_dataset(
            "text_windows",
            args={"text": paths, "tokenizer": CHARACTERS, "context": 4},
            validation_examples=5,
        ),
        "validation_examples must be 0, as the set has a validation split",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_say_what_to_do(write, case):
    contents, call, message = MISTAKES[case]
    with pytest.raises(UserError, match=message) as caught:
        call(write(**{**TEXTS, **contents}))
    for line in str(caught.value).splitlines():
        check_form(line)


def test_missing_files_are_all_named(tmp_path):
    paths = {split: str(tmp_path / split) for split in TEXTS}
    with pytest.raises(MissingFile) as caught:
        open_windows(paths)
    assert all(path in str(caught.value) for path in paths.values())
    with pytest.raises(MissingFile, match="text_windows, or prepared in"):
        load_dataset("my_text", data_dir=str(tmp_path))


def test_a_set_without_that_feature_says_which_it_has(tfds_dir):
    with pytest.raises(UserError, match=r"text features text, got \['de', 'en'\]"):
        args = {"text": "multi30k", "tokenizer": CHARACTERS, "context": 4}
        load_dataset("text_windows", data_dir=tfds_dir, args=args)
