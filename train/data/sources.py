"""Where examples come from: scikit-learn's digits, TFDS, text, or your own function.

Every source answers `len(source)` and `take(indices)`, so the input pipeline never
knows whether the arrays lie in memory or are read from disk, nor what they hold. The
image sets have "image" uint8 (n, x, y, c) and "label" int32 (n,); nothing is normalised
or augmented here.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import registry
from train.data import DATASETS, original_files, own_arrays, tfds_sets
from train.data.own_arrays import Arrays
from train.report import logs

# A split whose decoded pixels exceed this is read from disk batch by batch.
MEMORY_LIMIT_BYTES = 2**30
_DECODE_CHUNK = 1024


class Source(Protocol):
    """Random access to the examples of one split."""

    streams: bool

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Arrays:
        """Returns these rows of every array."""
        ...


class RawDataset(NamedTuple):
    """The splits as published, before a validation split is held out.

    Args:
      name: For messages.
      facts: What the source knows, as JSON: "arrays" (name -> "shape" and "dtype" of
        one example), "num_classes" where "label" is a class index, anything else that
        a task may need, and "about", what tells the set from others of its kind: a
        model may be fine-tuned on another, but a run does not go on with one.
      train: Examples to train on, and to hold a validation split out of.
      test: Examples of the same arrays.
      validation: Examples of the same arrays, where the set has such a split of its
        own: then none is held out.
    """

    name: str
    facts: dict[str, Any]
    train: Source
    test: Source
    validation: Source | None = None


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples that lie decoded in memory."""

    arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    streams: bool = dataclasses.field(default=False, init=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, indices: np.ndarray) -> Arrays:
        return {name: array[indices] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split of a prepared TFDS directory, decoded once or read on demand.

    Args:
      directory: the version directory, such as `.../mnist/3.0.1`.
      split: a split name of that data set.
      image_shape: (x, y, c) of every image.
      size: number of examples.
    """

    directory: str
    split: str
    image_shape: tuple[int, int, int]
    size: int

    @property
    def streams(self) -> bool:
        return self.size * int(np.prod(self.image_shape)) > MEMORY_LIMIT_BYTES

    def __len__(self) -> int:
        return self.size

    def take(self, indices: np.ndarray) -> Arrays:
        if self.streams:
            return _read(self, indices)
        return {name: array[indices] for name, array in _decode_all(self).items()}


@functools.lru_cache(maxsize=16)
def _records(source: TfdsSource) -> Any:
    """Opens the ArrayRecord files of a split; images stay encoded bytes."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(source.directory)
    # Decoding here rather than in TFDS takes two thirds of its time without OpenCV.
    return builder.as_data_source(
        split=source.split, decoders={"image": tfds.decode.SkipDecoding()}
    )


def _read(source: TfdsSource, indices: np.ndarray) -> Arrays:
    images = np.empty((len(indices), *source.image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    mode = "L" if source.image_shape[-1] == 1 else "RGB"
    records = _records(source).__getitems__([int(index) for index in indices])
    for row, record in enumerate(records):
        image = Image.open(io.BytesIO(record["image"]))
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        images[row] = pixels.reshape(source.image_shape)
        labels[row] = record["label"]
    return {"image": images, "label": labels}


@functools.lru_cache(maxsize=4)
def _decode_all(source: TfdsSource) -> Arrays:
    """Decodes a split once per process.

    One thread: with 28x28 and 32x32 PNGs the interpreter lock makes two threads a
    quarter slower than one (2 cores, 85 against 67 microseconds an image).
    """
    arrays = {
        "image": np.empty((source.size, *source.image_shape), np.uint8),
        "label": np.empty(source.size, np.int32),
    }
    place = f"{source.size:,} images of {source.directory}, {source.split}"
    with logs.stage(f"decoding {place}"):
        for start in range(0, source.size, _DECODE_CHUNK):
            rows = np.arange(start, min(start + _DECODE_CHUNK, source.size))
            for name, chunk in _read(source, rows).items():
                arrays[name][rows] = chunk
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def open_dataset(
    name: str | Callable[..., Mapping],
    *,
    data_dir: str = "",
    args: Mapping[str, Any] | None = None,
) -> RawDataset:
    """Opens a data set by name; see `pipeline.load_dataset`."""
    if callable(name):
        return _from_function(name, args or {})
    if name in DATASETS:
        spec = {"name": name, "args": args or {}}
        with errors.at(f"data set {name!r}"):
            return registry.build(spec, DATASETS, data_dir=data_dir)
    if args:
        raise UserError(
            f"data set {name!r}: only a function of your own takes args, or "
            f"{', '.join(sorted(DATASETS))}, got {sorted(args)}. Remove them."
        )
    if name == "digits":
        return _digits()
    root = tfds_sets.resolve_data_dir(data_dir)
    if original_files.is_there(name, root) and not tfds_sets.is_prepared(name, root):
        return _from_files(name, root / name)
    return _from_tfds(name, data_dir)


@functools.cache
def _digits() -> RawDataset:
    """1,797 handwritten digits that ship with scikit-learn, pixels 0 to 16."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rows = np.arange(len(labels))
    train, test = model_selection.train_test_split(
        rows, test_size=0.2, stratify=labels, random_state=0
    )
    sources = [
        ArraySource({"image": images[rows], "label": labels[rows]})
        for rows in (train, test)
    ]
    return RawDataset("digits", _image_facts((8, 8, 1), 10), *sources)


@functools.lru_cache(maxsize=4)
def _from_files(name: str, folder: pathlib.Path) -> RawDataset:
    """A set in its original files, whose examples have another order than TFDS's."""
    original = original_files.ORIGINALS[name]
    with errors.at(f"data set {name!r}"):
        train, test = original_files.read(original, folder)
    facts = _image_facts(original.image_shape, 10)
    facts["about"] = {"order": "original files"}
    return RawDataset(name, facts, ArraySource(train), ArraySource(test))


def _image_facts(shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    """Facts of a set of labelled images."""
    arrays = {
        "image": {"shape": list(shape), "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    }
    return {"arrays": arrays, "num_classes": num_classes}


def _from_function(build: Callable[..., Mapping], args: Mapping) -> RawDataset:
    name = f"{build.__module__}:{build.__qualname__}"
    with errors.at(name):
        splits, facts = own_arrays.read(build, args)
    sources = {split: ArraySource(arrays) for split, arrays in splits.items()}
    return RawDataset(name, facts, **sources)


def _from_tfds(name: str, data_dir: str) -> RawDataset:
    prepared = tfds_sets.open_set(name, data_dir)
    where, info = prepared.where, prepared.info
    features = info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"{where}: needs the features image and label, got {sorted(features)}. "
            "Give a function that returns arrays instead, or read text by one of "
            f"{', '.join(sorted(DATASETS))}."
        )
    # Not `.dtype`, which imports TensorFlow.
    shape, dtype = features["image"].shape, features["image"].np_dtype
    if None in shape or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise UserError(
            f"{where}: images must be uint8 of one size with 1 or 3 channels, got "
            f"{np.dtype(dtype)} {shape}. Give a function that returns arrays."
        )
    test = next((split for split in ("test", "validation") if split in info.splits), "")
    if "train" not in info.splits or not test:
        raise UserError(
            f"{where}: needs the splits train and test (or validation), got "
            f"{sorted(info.splits)}. Give a function that returns arrays instead."
        )
    sources = [
        TfdsSource(prepared.directory, split, shape, info.splits[split].num_examples)
        for split in ("train", test)
    ]
    facts = _image_facts(shape, features["label"].num_classes)
    return RawDataset(name, facts, *sources)
