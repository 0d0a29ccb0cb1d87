"""Batches are a pure function of (seed, step); every split holds what it says."""

import itertools
import os
import pathlib
import threading

import numpy as np
import pytest

from train.data import pipeline, sources
from train.data.pipeline import load_dataset, prefetch


def coloured_squares(size: int = 50):
    """Images whose first pixel is the number of the example."""
    images = np.zeros((size, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(size)
    arrays = {"image": images, "label": np.arange(size) % 5}
    return {"train": arrays, "test": {name: x[:7] for name, x in arrays.items()}}


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


def test_fewer_examples_to_learn_from_are_some_of_them():
    """The same validation split, and always the same ones."""
    few = load_dataset(coloured_squares, validation_examples=10, train_examples=16)
    assert few.sizes == {"train": 16, "validation": 10, "test": 7}
    some = {
        i for b in itertools.islice(few.train_batches(8, seed=1), 2) for i in ids(b)
    }
    again = {
        i for b in itertools.islice(few.train_batches(4, seed=2), 4) for i in ids(b)
    }
    held_out = {i for b in few.eval_batches("validation", 10) for i in ids(b)}
    whole = load_dataset(coloured_squares, validation_examples=10)
    assert held_out == {i for b in whole.eval_batches("validation", 5) for i in ids(b)}
    assert some == again and len(some) == 16 and not some & held_out


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
        (
            lambda d: load_dataset(
                coloured_squares, validation_examples=10, train_examples=41
            ),
            r"train_examples must be in \[0, 40\].*got 41",
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


@pytest.mark.parametrize(
    "name, fix",
    [
        ("pets", "one of cifar10, digits, .*, other, .*download_and_prepare"),
        ("mnist", "train.fetch mnist "),
        ("cifar10:3.0.2", "train.fetch cifar10 "),
    ],
)
def test_missing_data_says_how_to_get_it(name, fix, tmp_path, monkeypatch):
    (tmp_path / "other/1.0.0").mkdir(parents=True)
    (tmp_path / "other/1.0.0/features.json").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"(?s){fix}"):
        load_dataset(name)


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
