"""Where labelled images come from: scikit-learn's digits, TFDS, or your own function.

Every source answers `len(source)` and `take(indices)`, so the input pipeline never
knows whether the pixels lie in memory or are read from disk. Images are uint8
(n, x, y, c), labels int32 (n,); nothing is normalised or augmented here.
"""

import dataclasses
import functools
import io
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging
from PIL import Image

from lowrank_jax.errors import MissingFile, UserError

# A split whose decoded pixels exceed this is read from disk batch by batch.
MEMORY_LIMIT_BYTES = 2**30
_DECODE_CHUNK = 1024


class Source(Protocol):
    """Random access to the examples of one split."""

    streams: bool

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 (n, x, y, c) and labels int32 (n,)."""
        ...


class RawDataset(NamedTuple):
    """The two splits as published, before a validation split is held out."""

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    train: Source
    test: Source


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples that lie decoded in memory."""

    images: np.ndarray
    labels: np.ndarray
    streams: bool = dataclasses.field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


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

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.streams:
            return _read(self, indices)
        images, labels = _decode_all(self)
        return images[indices], labels[indices]


@functools.lru_cache(maxsize=16)
def _records(source: TfdsSource) -> Any:
    """Opens the ArrayRecord files of a split; images stay encoded bytes."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(source.directory)
    # Decoding here rather than in TFDS takes two thirds of its time without OpenCV.
    return builder.as_data_source(
        split=source.split, decoders={"image": tfds.decode.SkipDecoding()}
    )


def _read(source: TfdsSource, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(indices), *source.image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    mode = "L" if source.image_shape[-1] == 1 else "RGB"
    records = _records(source).__getitems__([int(index) for index in indices])
    for row, record in enumerate(records):
        image = Image.open(io.BytesIO(record["image"]))
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        images[row] = pixels.reshape(source.image_shape)
        labels[row] = record["label"]
    return images, labels


@functools.lru_cache(maxsize=4)
def _decode_all(source: TfdsSource) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a split once per process.

    One thread: with 28x28 and 32x32 PNGs the interpreter lock makes two threads a
    quarter slower than one (2 cores, 85 against 67 microseconds an image).
    """
    began = time.monotonic()
    images = np.empty((source.size, *source.image_shape), np.uint8)
    labels = np.empty(source.size, np.int32)
    for start in range(0, source.size, _DECODE_CHUNK):
        rows = np.arange(start, min(start + _DECODE_CHUNK, source.size))
        images[rows], labels[rows] = _read(source, rows)
    images.setflags(write=False)
    labels.setflags(write=False)
    seconds = time.monotonic() - began
    logging.info("decoded %s %s in %.1f s", source.directory, source.split, seconds)
    return images, labels


def open_dataset(
    name: str | Callable[..., Mapping],
    *,
    data_dir: str = "",
    args: Mapping[str, Any] | None = None,
) -> RawDataset:
    """Opens a data set by name; see `pipeline.load_dataset`."""
    if callable(name):
        return _from_function(name, args or {})
    if args:
        raise UserError(
            f"data set {name!r}: only a function of your own takes args, got "
            f"{sorted(args)}. Remove them."
        )
    if name == "digits":
        return _digits()
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
    sources = [ArraySource(images[rows], labels[rows]) for rows in (train, test)]
    return RawDataset("digits", (8, 8, 1), 10, *sources)


def _from_function(build: Callable[..., Mapping], args: Mapping) -> RawDataset:
    name = f"{build.__module__}:{build.__qualname__}"
    splits = build(**args)
    if not isinstance(splits, Mapping) or not {"train", "test"} <= set(splits):
        got = sorted(splits) if isinstance(splits, Mapping) else type(splits).__name__
        raise UserError(
            f"{name}: must return a dict with 'train' and 'test', got {got}. Return "
            "{'train': (images, labels), 'test': (images, labels)}."
        )
    problems, sources = [], {}
    for split in ("train", "test"):
        images, labels = (np.asarray(array) for array in splits[split])
        problems += _array_problems(f"{name}: {split}", images, labels)
        sources[split] = ArraySource(images, labels.astype(np.int32))
    shapes = {split: source.images.shape[1:] for split, source in sources.items()}
    if not problems and shapes["train"] != shapes["test"]:
        problems.append(f"{name}: splits must have one image shape, got {shapes}.")
    if problems:
        raise UserError("\n".join(problems))
    num_classes = 1 + max(int(source.labels.max()) for source in sources.values())
    return RawDataset(name, shapes["train"], num_classes, **sources)


def _array_problems(where: str, images: np.ndarray, labels: np.ndarray) -> list[str]:
    problems = []
    if images.dtype != np.uint8 or images.ndim != 4:
        problems.append(
            f"{where} images must be uint8 (n, x, y, c), got {images.dtype} "
            f"{images.shape}. Scale to 0..255, cast, and keep the channel axis."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        problems.append(
            f"{where} labels must be integers ({len(images)},), got {labels.dtype} "
            f"{labels.shape}. Give one class index per image."
        )
    elif labels.size == 0 or labels.min() < 0:
        problems.append(
            f"{where} labels must be class indices from 0, got "
            f"{labels.min() if labels.size else 'no examples'}."
        )
    return problems


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """Returns `data_dir`, else TFDS_DATA_DIR, else TFDS's own default."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def _find_version(name: str, root: pathlib.Path) -> pathlib.Path:
    """Returns the newest prepared version of `name`, without asking the network.

    `tfds.data_source` retries for 204 s when the data is missing and offline, so the
    directory is looked up here and opened with `builder_from_directory`.
    """
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        raise UserError(
            f"data set: must be 'digits', a TFDS name such as 'mnist' or 'cifar10', or "
            f"a function, got {name!r}. An import path 'package.module:function' is "
            "resolved to its function by the caller."
        )
    infos = (root / name.replace(":", "/")).glob("**/dataset_info.json")
    # Other names are what an interrupted preparation leaves.
    found = [path.parent for path in infos if re.fullmatch(r"[\d.]+", path.parent.name)]
    if not found:
        features = root.glob("*/**/features.json")
        prepared = sorted({path.relative_to(root).parts[0] for path in features})
        raise MissingFile(
            f"data set {name!r}: must be 'digits' or prepared in {root}, got neither; "
            f"found there: {', '.join(prepared) or 'nothing'}. Set "
            "config.data.data_dir or TFDS_DATA_DIR, or prepare it once on a machine "
            "with TensorFlow: "
            f"tfds.builder({name!r}, data_dir={str(root)!r}, "
            "file_format='array_record').download_and_prepare()"
        )
    configs = sorted({str(path.parent.relative_to(root)) for path in found})
    if ":" not in name and len(configs) > 1:
        raise UserError(
            f"data set {name!r}: must name one config, got several. Choose from "
            f"{', '.join(configs)}."
        )
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")])


def _from_tfds(name: str, data_dir: str) -> RawDataset:
    directory = _find_version(name, resolve_data_dir(data_dir))
    import tensorflow_datasets as tfds  # 3 s to import: only when it is needed

    info = tfds.builder_from_directory(str(directory)).info
    where = f"data set {name!r} in {directory}"
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{where}: files must be array_record, got {info.file_format.value}. "
            "Prepare it in another directory with file_format='array_record'."
        )
    features = info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"{where}: needs the features image and label, got {sorted(features)}. "
            "Give a function that returns arrays instead."
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
        TfdsSource(str(directory), split, shape, info.splits[split].num_examples)
        for split in ("train", test)
    ]
    return RawDataset(name, shape, features["label"].num_classes, *sources)
