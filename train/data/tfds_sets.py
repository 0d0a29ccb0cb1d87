"""Prepared TFDS sets on the disk, found and opened without the network."""

import functools
import os
import pathlib
import re
from typing import Any, NamedTuple

from lowrank_jax.errors import MissingFile, UserError, nearest, unknown
from train.data import DATASETS
from train.data.original_files import ORIGINALS


class PreparedSet(NamedTuple):
    """A version of a set, in ArrayRecord files.

    Args:
      where: For messages.
      directory: The version directory, such as `.../mnist/3.0.1`.
      info: What TFDS knows of it: its features and splits.
    """

    where: str
    directory: str
    info: Any


def open_set(name: str, data_dir: str) -> PreparedSet:
    """Returns the newest prepared version of a set.

    Args:
      name: As TFDS writes it: "mnist", "cifar10:3.0.2".
      data_dir: Where sets lie; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      MissingFile: It is not prepared there; says how to.
      UserError: The name is none of TFDS, or the files are of another format.
    """
    directory = str(_find_version(name, resolve_data_dir(data_dir)))
    where = f"data set {name!r} in {directory}"
    info = _read_info(directory)
    if info.file_format.value != "array_record":
        raise UserError(
            f"{where}: files must be array_record, got {info.file_format.value}. "
            "Prepare it in another directory with file_format='array_record'."
        )
    return PreparedSet(where, directory, info)


@functools.lru_cache(maxsize=16)
def _read_info(directory: str) -> Any:
    import tensorflow_datasets as tfds  # 3 s to import: only when it is needed

    return tfds.builder_from_directory(directory).info


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """Returns `data_dir`, else TFDS_DATA_DIR, else TFDS's own default."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def is_prepared(name: str, root: pathlib.Path) -> bool:
    """Returns whether a version of a set is prepared."""
    return bool(_versions(name, root))


def _versions(name: str, root: pathlib.Path) -> list[pathlib.Path]:
    """The prepared versions of a set, without those that were left half done."""
    infos = (root / name.replace(":", "/")).glob("**/dataset_info.json")
    folders = [path.parent for path in infos]
    return [folder for folder in folders if re.fullmatch(r"[\d.]+", folder.name)]


def _missing(name: str, root: pathlib.Path) -> UserError:
    """What to do about a set that is not there."""
    features = root.glob("*/**/features.json")
    prepared = {path.relative_to(root).parts[0] for path in features}
    known = sorted({"digits", *DATASETS, *ORIGINALS, *prepared})
    base = re.sub(r"[:/].*", "", name)
    if base in ORIGINALS:
        files = ", ".join(file.name for file in ORIGINALS[base].files)
        how = "Run" if name == base else f"Write {base!r}, and run"
        return MissingFile(
            f"data set {name!r}: must be in {root}, got nothing of it there. {how}"
            f" python -m train.fetch {base} --data_dir={root} (no TensorFlow needed),"
            " or set config.data.data_dir or TFDS_DATA_DIR to where it is.\n"
            f"  as it was published: {root}/{base}/ with {files}\n"
            f"  as TFDS prepares it: {root}/{base}/VERSION/ with dataset_info.json and"
            " *.array_record*"
        )
    if base not in known and nearest(base, known) is not None:
        what = f"a known name, or a set that is prepared in {root}"
        return UserError(f"data set: {unknown(what, name, known)}")
    return MissingFile(
        f"data set {name!r}: must be one of {', '.join(known)}, or prepared in {root},"
        " got neither. Set config.data.data_dir or TFDS_DATA_DIR to where it is, or"
        " prepare it once on a machine with TensorFlow:\n"
        f"  tfds.builder({name!r}, data_dir={str(root)!r},"
        " file_format='array_record').download_and_prepare()\n"
        f"  which makes {root}/{base}/VERSION/ with dataset_info.json and"
        " *.array_record*"
    )


def _find_version(name: str, root: pathlib.Path) -> pathlib.Path:
    """Returns the newest prepared version of `name`, without asking the network.

    `tfds.data_source` retries for 204 s when the data is missing and offline, so the
    directory is looked up here and opened with `builder_from_directory`.
    """
    known = ", ".join(["digits", *sorted(DATASETS)])
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        raise UserError(
            f"data set: must be one of {known}, a TFDS name such as 'mnist' or "
            f"'cifar10', or a function, got {name!r}. An import path "
            "'package.module:function' is resolved to its function by the caller."
        )
    found = _versions(name, root)
    if not found:
        raise _missing(name, root)
    configs = sorted({str(path.parent.relative_to(root)) for path in found})
    if ":" not in name and len(configs) > 1:
        raise UserError(
            f"data set {name!r}: must name one config, got several. Choose from "
            f"{', '.join(configs)}."
        )
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")])
