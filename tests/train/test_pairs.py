"""Pairs of sentences packed into rows: none lost, none twice, none cut."""

import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_form

from lowrank_jax.errors import MissingFile, UserError
from train.data import pairs, tokenizers
from train.data.pipeline import load_dataset

CHARACTERS = {"name": "characters", "args": {}}
PAD, BOS, EOS = 0, 1, 2
LINES = {
    "train": (["a cat", "the hat", "a mat", "cat"], ["cat a", "hat eht", "t", "tac"]),
    "validation": (["a hat", "the cat"], ["tah a", "eht"]),
    "test": (["mat"], ["tam"]),
}


def unpack(batch):
    """The pairs of tokens in rows, after checks of their alignment."""
    names = ("source", "source_segment", "target", "target_segment", "label")
    for source, source_segment, target, target_segment, label in zip(
        *(batch[name] for name in names), strict=True
    ):
        count = source_segment.max()
        assert count == target_segment.max()
        for segment, tokens in ((source_segment, source), (target_segment, target)):
            there = segment[segment > 0]
            assert there.tolist() == sorted(there)  # side by side, from the left
            assert (segment[: len(there)] > 0).all()
            assert set(there) == set(range(1, count + 1))
            assert (tokens[segment == 0] == PAD).all()
        assert (label[target_segment == 0] == PAD).all()
        for number in range(1, count + 1):
            from_ = source[source_segment == number]
            to, shifted = (x[target_segment == number] for x in (target, label))
            assert (from_[-1], to[0], shifted[-1]) == (EOS, BOS, EOS)
            assert to[1:].tolist() == shifted[:-1].tolist()
            yield tuple(from_[:-1].tolist()), tuple(to[1:].tolist())


sentences = st.lists(st.integers(3, 200), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(
    given_pairs=st.lists(st.tuples(sentences, sentences), min_size=1, max_size=30),
    lengths=st.tuples(st.integers(7, 20), st.integers(7, 20)),
)
def test_every_pair_is_in_exactly_one_row(given_pairs, lengths):
    arrays = pairs.pack(
        [tuple(np.array(side, np.uint8) for side in pair) for pair in given_pairs],
        lengths,
        np.dtype(np.uint8),
    )
    rows = {len(array) for array in arrays.values()}
    assert len(rows) == 1
    assert {name: str(array.dtype) for name, array in arrays.items()} == dict.fromkeys(
        ("source", "source_segment", "target", "target_segment", "label"), "uint8"
    )
    expected = sorted((tuple(source), tuple(target)) for source, target in given_pairs)
    assert sorted(unpack(arrays)) == expected


def test_a_pair_goes_where_there_is_room_first():
    sizes = np.array([[6, 6], [6, 2], [2, 2], [2, 5], [1, 1], [1, 1]])
    row, segment = pairs.assign(sizes, (8, 8))
    assert row.tolist() == [0, 1, 0, 1, 2, 2]
    assert segment.tolist() == [1, 1, 2, 2, 1, 2]


def test_a_row_holds_no_more_pairs_than_its_numbers_count():
    row, segment = pairs.assign(np.full((300, 2), 2), (2000, 2000))
    assert np.bincount(row).tolist() == [255, 45]
    assert segment.max() == 255


@pytest.fixture
def write(tmp_path):
    """Writes lines for each split; returns the paths of both sides."""

    def write(**changes):
        paths = {}
        for split, sides in {**LINES, **changes}.items():
            paths[split] = [str(tmp_path / f"{split}.{n}") for n in range(2)]
            for path, lines in zip(paths[split], sides, strict=True):
                pathlib.Path(path).write_text("".join(f"{line}\n" for line in lines))
        return paths

    return write


def open_pairs(text, data_dir="", **changes):
    args = {"text": text, "source": "a", "target": "b", "tokenizer": CHARACTERS}
    args |= {"source_length": 20, "target_length": 16, **changes}
    return load_dataset("sentence_pairs", data_dir=data_dir, args=args)


def read_back(dataset, split, batch_size=2):
    """All pairs of a split, as text."""
    tokenizer = tokenizers.from_facts(dataset.facts["tokenizer"])
    for batch in dataset.eval_batches(split, batch_size, multiple_of=3):
        rows = {name: x[batch["weight"] > 0] for name, x in batch.items()}
        assert not batch["target_segment"][batch["weight"] == 0].any()
        for pair in unpack(rows):
            yield tuple(map(tokenizer.decode, pair))


def test_files_of_lines_come_back_whole(write):
    dataset = open_pairs(write())
    for split, sides in LINES.items():
        found = sorted(read_back(dataset, split))
        assert found == sorted(zip(*sides, strict=True))
    facts = dict(dataset.facts)
    letters = "".join(sorted(set("".join(map("".join, LINES["train"])))))
    assert facts.pop("tokenizer")["characters"] == letters
    about = facts.pop("about")
    assert len(set(about["digests"].values())) == 3
    shares = about["pad_share"]
    used = (3 + 1 + 3 + 1) / (20 + 16)  # of the test's only pair
    assert shares["test"] == round(1 - used, 4)
    by_row = {"dtype": "uint8"}
    source, target = {"shape": [20], **by_row}, {"shape": [16], **by_row}
    assert facts == {
        "arrays": {
            "source": source,
            "source_segment": source,
            "target": target,
            "target_segment": target,
            "label": target,
        },
        "vocab_size": 3 + len(letters),
        "specials": {"pad": PAD, "bos": BOS, "eos": EOS},
    }
    assert about["dropped_pairs"] == 0
    batch = next(dataset.train_batches(1, seed=0))
    assert batch["source"].shape == (1, 20)


def test_training_pairs_that_do_not_fit_are_dropped_and_counted(write):
    sides = [[*LINES["train"][0], "cat " * 9, "", "hat"]]
    sides += [[*LINES["train"][1], "tac", "tac", "tah " * 9]]
    dataset = open_pairs(write(train=sides))
    assert dataset.facts["about"]["dropped_pairs"] == 3
    found = sorted(read_back(dataset, "train"))
    assert found == sorted(zip(*LINES["train"], strict=True))


@pytest.mark.parametrize(
    ("split", "sides", "changes", "message"),
    [
        ("test", (["cat " * 5], ["t"]), {}, "test text: pairs must.*number 1 with 20"),
        ("validation", (["a", ""], ["a", "t"]), {}, "got 1 that.* number 2 with 0 and"),
        (
            "train",
            (["the mat " * 9], ["c"]),
            {},
            "train text: must hold a pair.* got none",
        ),
        ("train", (["a", "b"], ["a"]), {}, r"as many sentences.*got \[2, 1\]"),
        ("test", ([], []), {}, r"test text: must have.*got \[0, 0\]"),
        (
            "test",
            (["Zoo"], ["t"]),
            {},
            "test: source: sentence 1: text: characters must be.*'Z', 'o'",
        ),
        ("test", (["a"], ["t"]), {"source_length": 1}, "source_length: must be at lea"),
    ],
)
def test_mistakes_say_what_to_do(write, split, sides, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        open_pairs(write(**{split: sides}), **changes)
    for line in str(caught.value).splitlines():
        check_form(line)


def test_files_must_come_in_pairs(write, tmp_path):
    paths = write()
    with pytest.raises(UserError, match=r"text\.test: must be 2 paths"):
        open_pairs({**paths, "test": paths["test"][:1]})
    with pytest.raises(MissingFile, match="nowhere"):
        open_pairs({**paths, "test": [str(tmp_path / "nowhere"), paths["test"][1]]})


@pytest.mark.slow
def test_multi30k_has_few_pads():
    shared = pathlib.Path(__file__).parents[2] / ".." / "shared" / "tfds"
    data_dir = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or shared)
    if not (data_dir / "multi30k").is_dir():
        pytest.skip("no prepared multi30k in TFDS_DATA_DIR or ../shared/tfds")
    dataset = open_pairs(
        "multi30k",
        str(data_dir),
        source="en",
        target="de",
        tokenizer={"name": "byte_pairs", "args": {"vocab_size": 8000}},
        source_length=128,
        target_length=128,
    )
    facts = dataset.facts
    assert (facts["vocab_size"], facts["about"]["dropped_pairs"]) == (8000, 0)
    assert facts["arrays"]["label"] == {"shape": [128], "dtype": "uint16"}
    assert facts["about"]["pad_share"]["train"] < 0.06
    found = list(read_back(dataset, "test", batch_size=64))
    assert len(found) == 1000
    expected = "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt."
    assert ("A man in an orange hat starring at something.", expected) in found
