"""A function's own arrays: all that is wrong is said at once, the rest is read."""

import numpy as np
import pytest

from lowrank_jax.errors import UserError
from train.data.pipeline import load_data, load_dataset


def splits(**arrays):
    """A function's result: all examples to train on, the first seven to test on."""
    return {
        "train": arrays,
        "test": {name: array[:7] for name, array in arrays.items()},
    }


IMAGES, LABELS = np.zeros((9, 2, 2, 1), np.uint8), np.arange(9) % 3
SIXTY_FOUR = {"big": np.full(9, 2**40), "word": np.array(["a"] * 9), "none": [None] * 9}

WRONG = {
    "pairs without names": (
        {"train": (IMAGES, LABELS), "test": (IMAGES, LABELS)},
        ["train must be a dict of named arrays, got tuple", "test must be a dict"],
    ),
    "no arrays": (splits(), ["train must be a dict", "got none", "test must be"]),
    "another split": (
        splits(x=LABELS) | {"valid": {"x": LABELS}},
        ["'train' and 'test'", "'valid'"],
    ),
    "several lengths": (
        splits(x=IMAGES, y=LABELS[:8]),
        ["train must have as many rows", "{'x': 9, 'y': 8}"],
    ),
    "no examples": (splits(x=IMAGES[:0]), ["train must hold at least one example"]),
    "no numbers": (
        splits(**SIXTY_FOUR),
        [f"{s}['{n}'] must" for s in ("train", "test") for n in SIXTY_FOUR],
    ),
    "ragged": (splits(x=[[1, 2], [3]]), ["train['x'] must be an array", "Pad it"]),
    "a single number": (
        {"train": {"x": 1.0}, "test": {"x": 1.0}},
        ["train['x'] must be numbers", "test['x']"],
    ),
    "no weight": (splits(weight=LABELS - 1, x=LABELS), ["train['weight'] must be one"]),
    "splits apart": (
        {
            "train": {"a": LABELS, "b": LABELS, "c": LABELS},
            "test": {"a": IMAGES, "b": LABELS},
        },
        ["'a' must be the same in both splits", "'c' must be", "none to test on"],
    ),
    "facts that are no JSON": (
        splits(x=LABELS) | {"facts": {"mean": np.zeros(3)}},
        ["'facts' must hold JSON values only"],
    ),
    "facts of arrays": (
        splits(x=LABELS) | {"facts": {"arrays": {}}},
        ["'facts' must be a dict without 'arrays'"],
    ),
    "too few classes": (
        splits(label=LABELS) | {"facts": {"num_classes": 2}},
        ["facts['num_classes'] must be", "at least 3", "got 2"],
    ),
    "a token past the vocabulary": (
        splits(tokens=np.full((9, 4), 5)) | {"facts": {"vocab_size": 5}},
        ["train['tokens']: must hold tokens in [0, 4]", "got 5 to 5", "test['tokens']"],
    ),
    "padding by -1": (
        splits(source=np.full((9, 4), -1)) | {"facts": {"vocab_size": 5}},
        ["train['source']: must hold tokens in [0, 4]", "got -1 to -1", "padding"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_all_reported(case):
    result, parts = WRONG[case]
    with pytest.raises(UserError) as caught:
        load_dataset(lambda: result)
    assert "<lambda>: " in str(caught.value)  # where
    for part in parts:
        assert part in str(caught.value)


def test_a_function_gives_arrays_of_any_names():
    """In the types JAX computes in, with their facts and the function's own."""
    rng = np.random.default_rng(0)
    x, tokens = rng.normal(size=(20, 3)), rng.integers(0, 99, (20, 5))
    ways = splits(x=x, tokens=tokens) | {"facts": {"vocabulary": 99, "axes": (1, 2)}}
    dataset = load_dataset(lambda: ways, validation_examples=4)
    assert dataset.facts == {
        "arrays": {
            "x": {"shape": [3], "dtype": "float32"},
            "tokens": {"shape": [5], "dtype": "int32"},
        },
        "vocabulary": 99,
        "axes": [1, 2],
    }
    batch = next(dataset.train_batches(16, seed=0))
    assert {name: array.shape for name, array in batch.items()} == {
        "x": (16, 3),
        "tokens": (16, 5),
    }
    for x_row, token_row in zip(batch["x"], batch["tokens"], strict=True):
        (row,) = np.flatnonzero((tokens == token_row).all(1))  # rows stay together
        np.testing.assert_array_equal(x_row, x[row].astype(np.float32))


@pytest.mark.parametrize(
    ("label", "facts", "expected"),
    [
        (LABELS, {}, 3),
        (LABELS.astype(np.uint8), {"num_classes": 5}, 5),
        (LABELS - 1, {}, None),  # no class index
        (LABELS / 2, {}, None),
        (np.stack([LABELS] * 2, 1), {}, None),
    ],
)
def test_the_number_of_classes_is_what_labels_say(label, facts, expected):
    dataset = load_dataset(lambda: splits(label=label) | {"facts": facts})
    assert dataset.facts.get("num_classes") == expected


def test_examples_weigh_what_their_source_says():
    """Training and evaluation alike; rows that pad a batch still weigh nothing."""
    weight, number = np.arange(9) / 4, np.arange(9)
    dataset = load_dataset(lambda: splits(number=number, weight=weight))
    batch = next(dataset.train_batches(9, seed=0))
    np.testing.assert_array_equal(batch["weight"], batch["number"] / 4)
    batches = list(dataset.eval_batches("test", 5))
    weights = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(weights, [*weight[:7], 0, 0, 0])
    assert weights.dtype == np.float32


def nine_images():
    return splits(image=IMAGES, label=LABELS)


def test_a_function_is_imported_by_its_path_with_consent():
    own = {"name": f"{__name__}:nine_images", "args": {}, "data_dir": ""}
    own |= {"validation_examples": 5, "train_examples": 0}
    with pytest.raises(UserError, match="allow_imports"):
        load_data(own, allow_imports=[])
    assert load_data(own, allow_imports=None).sizes["validation"] == 5
