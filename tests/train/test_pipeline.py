"""Batches are a pure function of (seed, step); every split holds what it says."""

import itertools
import os
import pathlib
import threading

import numpy as np
import pytest

from lowrank_jax.errors import UserError
from train.data import pipeline, sources
from train.data.pipeline import load_dataset, prefetch


def coloured_squares(size: int = 50, classes: int = 5):
    """Images whose first pixel is the number of the example."""
    labels = np.arange(size) % classes
    images = np.zeros((size, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(size)
    return splits(image=images, label=labels)


def splits(**arrays):
    """A function's result: all examples to train on, the first seven to test on."""
    return {
        "train": arrays,
        "test": {name: array[:7] for name, array in arrays.items()},
    }


def ids(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def test_processes_share_every_batch():
    """Each reads its own rows, which need not lie beside each other; together they
    have what one would have, padding at the end included."""
    dataset = pipeline.load_dataset("digits", validation_examples=137)
    shares = [np.array([0, 3, 4]), np.array([1, 2, 5])]

    def joined(batches):
        for parts in batches:
            batch = {name: np.zeros((6, *x.shape[1:])) for name, x in parts[0].items()}
            for rows, part in zip(shares, parts, strict=True):
                for name, array in part.items():
                    batch[name][rows] = array
            yield batch

    def same(whole, shared, count):
        both = zip(whole, joined(zip(*shared, strict=True)), strict=True)
        for batch, other in itertools.islice(both, count):
            for name, array in batch.items():
                np.testing.assert_array_equal(other[name], array)

    train = [dataset.train_batches(6, seed=1, rows=rows) for rows in shares]
    same(dataset.train_batches(6, seed=1), train, 3)
    split = {"split": "validation", "batch_size": 5, "multiple_of": 6}
    held_out = [dataset.eval_batches(**split, rows=rows) for rows in shares]
    same(dataset.eval_batches(**split), held_out, None)


@pytest.fixture(scope="module")
def tfds_dir():
    """A directory with prepared MNIST and CIFAR-10, or a skip."""
    shared = pathlib.Path(__file__).parents[2] / ".." / "shared" / "tfds"
    for candidate in (os.environ.get("TFDS_DATA_DIR"), shared):
        if candidate and all(
            (pathlib.Path(candidate) / name).is_dir() for name in ("mnist", "cifar10")
        ):
            return str(candidate)
    pytest.skip("no prepared MNIST and CIFAR-10 in TFDS_DATA_DIR or ../shared/tfds")


@pytest.fixture
def dataset():
    return load_dataset(coloured_squares, validation_examples=10)


def image_facts(shape, num_classes):
    arrays = {
        "image": {"shape": shape, "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    }
    return {"arrays": arrays, "num_classes": num_classes}


@pytest.mark.parametrize("start_step", [0, 3, 5, 12])
def test_a_resumed_stream_equals_the_skipped_one(dataset, start_step):
    full = itertools.islice(dataset.train_batches(8, seed=3), start_step, 15)
    resumed = dataset.train_batches(8, seed=3, start_step=start_step)
    for expected, got in zip(full, resumed, strict=False):
        np.testing.assert_array_equal(got["image"], expected["image"])
        np.testing.assert_array_equal(got["label"], expected["label"])


def test_every_epoch_is_another_permutation_of_the_training_split(dataset):
    batches = dataset.train_batches(8, seed=0)
    epochs = [sum((ids(next(batches)) for _ in range(5)), []) for _ in range(3)]
    assert dataset.steps_per_epoch(8) == 5
    for epoch in epochs:
        assert len(set(epoch)) == 40
        assert set(epoch) == set(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sum(
        (ids(b) for b in itertools.islice(dataset.train_batches(8, seed=1), 5)), []
    )


def test_the_remainder_of_an_epoch_is_dropped(dataset):
    first = list(itertools.islice(dataset.train_batches(16, seed=0), 2))
    assert dataset.steps_per_epoch(16) == 2
    assert len({i for batch in first for i in ids(batch)}) == 32


def test_validation_is_disjoint_from_train_and_free_of_the_seed(dataset):
    held_out = {i for b in dataset.eval_batches("validation", 10) for i in ids(b)}
    train = {
        i for b in itertools.islice(dataset.train_batches(8, seed=9), 5) for i in ids(b)
    }
    assert dataset.sizes == {"train": 40, "validation": 10, "test": 7}
    assert len(held_out) == 10
    assert held_out | train == set(range(50))
    again = load_dataset(coloured_squares, validation_examples=10)
    assert held_out == {i for b in again.eval_batches("validation", 5) for i in ids(b)}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_padding_rows_weigh_nothing(dataset, batch_size):
    batches = list(dataset.eval_batches("test", batch_size))
    assert sum(batch["weight"].sum() for batch in batches) == 7
    for batch in batches:
        assert batch["image"].shape == (batch_size, 4, 4, 3)
        assert batch["label"].shape == batch["weight"].shape == (batch_size,)
        assert (batch["label"].dtype, batch["weight"].dtype) == (np.int32, np.float32)
    seen = [
        i
        for batch in batches
        for i, weight in zip(ids(batch), batch["weight"], strict=True)
        if weight
    ]
    assert seen == list(range(7))


def test_digits_are_the_real_ones():
    digits = load_dataset("digits", validation_examples=100)
    assert digits.sizes == {"train": 1337, "validation": 100, "test": 360}
    assert digits.facts == image_facts([8, 8, 1], 10)
    (batch,) = digits.eval_batches("test", 360)
    assert batch["image"].dtype == np.uint8
    assert batch["image"].max() == 16
    assert np.bincount(batch["label"]).min() >= 34  # stratified
    assert 4.5 < batch["image"].mean() < 5.3  # 4.88 over the whole set


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.steps_per_epoch(41), r"batch_size must be in \[1, 40\]"),
        (lambda d: d.train_batches(41, seed=0), "batch_size"),
        (lambda d: d.train_batches(8, seed=-1), "seed"),
        (lambda d: d.eval_batches("test", 0), "batch_size"),
        (
            lambda d: load_dataset(coloured_squares, validation_examples=50),
            r"\[0, 49\]",
        ),
        (lambda d: load_dataset("digits", args={"a": 1}), "only a function"),
        (lambda d: load_dataset("my_package.data:build"), "resolved"),
        (lambda d: load_dataset(lambda: {"train": 1}), "'train' and 'test'"),
        (lambda d: load_dataset(coloured_squares, args={"sise": 1}), "'size'.*'sise'"),
    ],
)
def test_mistakes_are_named_at_once(dataset, call, message):
    with pytest.raises(ValueError, match=message):
        call(dataset)


def test_an_empty_validation_split_says_what_to_set():
    dataset = load_dataset(coloured_squares)
    with pytest.raises(ValueError, match="validation_examples"):
        dataset.eval_batches("validation", 4)
    with pytest.raises(KeyError, match="split must be one of"):
        dataset.eval_batches("dev", 4)


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


def test_a_function_is_imported_by_its_path_with_consent():
    own = {"name": f"{__name__}:coloured_squares", "args": {}, "data_dir": ""}
    own["validation_examples"] = 5
    with pytest.raises(UserError, match="allow_imports"):
        pipeline.load_data(own, allow_imports=[])
    assert pipeline.load_data(own, allow_imports=None).sizes["validation"] == 5


@pytest.mark.parametrize("name", ["mnist", "mnits", "cifar10:3.0.2"])
def test_missing_data_says_how_to_prepare_it(name, tmp_path, monkeypatch):
    (tmp_path / "other/1.0.0").mkdir(parents=True)
    (tmp_path / "other/1.0.0/features.json").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="download_and_prepare") as caught:
        load_dataset(name)
    assert "found there: other" in str(caught.value)


@pytest.mark.slow
def test_mnist_is_decoded_once_and_streams_alike(tfds_dir, monkeypatch):
    mnist = load_dataset("mnist", data_dir=tfds_dir, validation_examples=5000)
    assert mnist.sizes == {"train": 55000, "validation": 5000, "test": 10000}
    in_memory = next(mnist.train_batches(100, seed=0, start_step=700))
    again = load_dataset("mnist", data_dir=tfds_dir)
    assert again.splits["train"].source == mnist.splits["train"].source
    arrays = sources._decode_all(mnist.splits["train"].source)
    assert (
        abs(arrays["image"].mean() / 255 - 0.1307) < 1e-4
    )  # the figure everyone normalises by
    assert np.bincount(arrays["label"]).tolist()[:2] == [5923, 6742]
    monkeypatch.setattr(sources, "MEMORY_LIMIT_BYTES", 0)
    streamed = next(mnist.train_batches(100, seed=0, start_step=700))
    np.testing.assert_array_equal(streamed["image"], in_memory["image"])
    np.testing.assert_array_equal(streamed["label"], in_memory["label"])


def test_cifar10_streams_in_colour(tfds_dir, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_LIMIT_BYTES", 0)
    cifar = load_dataset("cifar10", data_dir=tfds_dir)
    assert cifar.facts == image_facts([32, 32, 3], 10)
    first, second = itertools.islice(cifar.eval_batches("test", 500), 2)
    assert not np.array_equal(first["image"], second["image"])
    channels = first["image"].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(channels, [0.491, 0.482, 0.447], atol=0.02)


def test_a_set_without_images_is_refused(tfds_dir):
    if not (pathlib.Path(tfds_dir) / "tiny_shakespeare").is_dir():
        pytest.skip("no prepared tiny_shakespeare beside MNIST")
    with pytest.raises(ValueError, match="features image and label"):
        load_dataset("tiny_shakespeare", data_dir=tfds_dir)


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("features.json", '"28"', '"-1"', r"one size.* uint8 \(None, None, 1\)"),
        ("dataset_info.json", "array_record", "tfrecord", "must be array_record"),
        ("dataset_info.json", '"test"', '"extra"', "splits train and test"),
    ],
)
def test_a_set_of_another_form_is_refused(
    tfds_dir, tmp_path, file, before, after, message
):
    (source,) = (pathlib.Path(tfds_dir) / "mnist").iterdir()
    target = tmp_path / "mnist" / source.name
    target.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json"):
        text = (source / name).read_text()
        target.joinpath(name).write_text(
            text.replace(before, after) if name == file else text
        )
    with pytest.raises(ValueError, match=message):
        load_dataset("mnist", data_dir=str(tmp_path))


def test_prefetch_keeps_order_and_stops_its_thread():
    assert list(prefetch(iter(range(20)))) == list(range(20))
    closed = threading.Event()

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = prefetch(endless(), size=3)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert closed.is_set()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_raises_what_the_source_raised():
    def failing():
        yield 1
        raise OSError("disk gone")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)
    with pytest.raises(ValueError, match="size"):
        prefetch([], size=0)
