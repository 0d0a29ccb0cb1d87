"""Text by split: features of a prepared TFDS set, or plain UTF-8 files.

What `locate` returns is hashable and says which version of a file is meant, so that
what is made of the text can be kept for as long as the process lives.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lowrank_jax.errors import MissingFile, UserError, raise_all
from train.data import tfds_sets

SPLITS = ("train", "validation", "test")
WHOLE = "file"
"""The key of a text that is cut into splits here."""
SUFFIX = ".txt"
"""Tells the path of such a text from the name of a TFDS set."""

Columns = list[list[str]]
"""The records of each feature."""


class PreparedText(NamedTuple):
    """Text features of a prepared TFDS set; a record is one example's."""

    where: str
    directory: str
    features: tuple[str, ...]

    def read(self, split: str) -> Columns:
        """Returns the records of each feature.

        Raises:
          UserError: A record that is not UTF-8.
        """
        examples = _read_examples(self.directory, split)
        return [
            [
                _decode(example[feature], f"{self.where}: {split} {feature} {number}")
                for number, example in enumerate(examples)
            ]
            for feature in self.features
        ]


class TextFile(NamedTuple):
    """A version of a file."""

    path: str
    modified_ns: int
    size: int

    def read(self) -> str:
        """Returns its text as it stands there, line ends included.

        Raises:
          UserError: It is not UTF-8; says at which byte.
        """
        return _decode(pathlib.Path(self.path).read_bytes(), self.path)


class TextFiles(NamedTuple):
    """Files of each split, or one that is cut into splits here."""

    by_split: tuple[tuple[str, tuple[TextFile, ...]], ...]


Place = PreparedText | TextFiles


def locate(
    text: str | Mapping[str, str | Sequence[str]],
    features: Sequence[str],
    data_dir: str,
) -> Place:
    """Finds a text without reading it.

    Args:
      text: The name of a TFDS set, or by split the paths of files, one for each
        feature; {"file": path}, or the path alone where it ends in .txt, for one that
        is cut into splits.
      features: Names of text features of the set.
      data_dir: Where TFDS sets lie, and what relative paths start from; "" for
        TFDS_DATA_DIR and the working directory.

    Raises:
      MissingFile: A file or set is not there.
      UserError: Other splits, other features, or another number of files.
    """
    if isinstance(text, str) and text.endswith(SUFFIX):
        text = {WHOLE: text}
    if isinstance(text, str):
        return _locate_features(text, tuple(features), data_dir)
    whole = set(text) == {WHOLE} and len(features) == 1
    if not whole and set(text) != set(SPLITS):
        raise UserError(
            "text: must be the name of a TFDS set or have the keys"
            f" {', '.join(SPLITS)}{' (or file alone)' if len(features) == 1 else ''},"
            f" got {sorted(text)}. Give a path for each."
        )
    order = [WHOLE] if whole else SPLITS
    paths = {split: _as_paths(text[split]) for split in order}
    raise_all(
        [
            f"text.{split}: must be {len(features)} paths, got {text[split]!r}."
            f" Give one for each of {', '.join(features)}."
            for split, names in paths.items()
            if len(names) != len(features)
        ]
    )
    missing, found = [], []
    for split, names in paths.items():
        files = [pathlib.Path(data_dir, name).expanduser() for name in names]
        missing += [str(file) for file in files if not file.is_file()]
        found.append((split, files))
    if missing:
        raise MissingFile(
            f"text: must be files that are there, got {', '.join(missing)}. Correct the"
            " paths; relative ones start from config.data.data_dir, or from the working"
            " directory where it is ''."
        )
    return TextFiles(
        tuple((split, tuple(map(_stamped, files))) for split, files in found)
    )


def read_texts(place: Place) -> dict[str, str]:
    """Returns the whole text of each split.

    Records are joined by line ends. Of one file for all, the first 90 % of the
    characters are for training, 5 % for validation and the last 5 % to test.

    Raises:
      UserError: Text that is not UTF-8, or a split without any.
    """
    if isinstance(place, PreparedText):
        texts = {split: "\n".join(place.read(split)[0]) for split in SPLITS}
        where = dict.fromkeys(SPLITS, place.where)
    else:
        files = {split: file for split, (file,) in place.by_split}
        texts = {split: file.read() for split, file in files.items()}
        if WHOLE in files:
            texts = _cut(texts[WHOLE])
        where = {split: files.get(split, files.get(WHOLE)).path for split in SPLITS}
    raise_all(
        [
            f"{where[split]}: {split} text must hold characters, got an empty one. Add"
            " some."
            for split, text in texts.items()
            if not text
        ]
    )
    return texts


def read_lines(place: Place) -> dict[str, Columns]:
    """Returns, by split, the sentences of each feature: records, or lines of a file.

    Raises:
      UserError: Text that is not UTF-8, or a split whose features have not as many
        sentences each, or none.
    """
    if isinstance(place, PreparedText):
        by_split = {split: place.read(split) for split in SPLITS}
    else:
        by_split = {
            split: [_lines(file.read()) for file in files]
            for split, files in place.by_split
        }
    problems = []
    for split, columns in by_split.items():
        counts = [len(column) for column in columns]
        if len(set(counts)) > 1 or not counts[0]:
            problems.append(
                f"{split} text: must have as many sentences on each side, one a line,"
                f" and at least one, got {counts}. Align them."
            )
    raise_all(problems)
    return by_split


def _lines(text: str) -> list[str]:
    # not `splitlines`, which also ends lines at characters within a sentence
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _cut(text: str) -> dict[str, str]:
    ends = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    spans = zip(SPLITS, ends, ends[1:], strict=False)
    return {split: text[start:end] for split, start, end in spans}


def _as_paths(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _stamped(file: pathlib.Path) -> TextFile:
    about = file.stat()
    return TextFile(os.path.abspath(file), about.st_mtime_ns, about.st_size)


def _locate_features(
    name: str, features: tuple[str, ...], data_dir: str
) -> PreparedText:
    prepared = tfds_sets.open_set(name, data_dir)
    info = prepared.info
    there = sorted(
        feature
        for feature, about in info.features.items()
        if type(about).__name__ == "Text"  # importing the class takes 3 s
    )
    problems = []
    if not set(features) <= set(there):
        problems.append(
            f"{prepared.where}: needs the text features {', '.join(features)}, got"
            f" {there or sorted(info.features)}. Choose among them."
        )
    if not set(SPLITS) <= set(info.splits):
        problems.append(
            f"{prepared.where}: needs the splits {', '.join(SPLITS)}, got"
            f" {sorted(info.splits)}. Write it to plain files instead."
        )
    raise_all(problems)
    return PreparedText(prepared.where, prepared.directory, features)


def _read_examples(directory: str, split: str) -> Sequence[Mapping[str, bytes]]:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(directory).as_data_source(split=split)
    return source.__getitems__(range(len(source)))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: must be UTF-8, got byte 0x{data[error.start]:02x} at offset"
            f" {error.start:,} ({error.reason}). Convert it to UTF-8."
        ) from error
