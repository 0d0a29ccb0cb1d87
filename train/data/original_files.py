"""Image sets as their authors publish them: checked, and read without TensorFlow.

IDX (LeCun, 1998): two zero bytes, a type (8: uint8), the number of axes, each size as a
big-endian uint32, then the values. CIFAR-10's binary version: 3,073 bytes an image, the
label, then 1,024 pixels of each channel. Sizes and digests are those that TensorFlow
Datasets has in its `url_checksums`.
"""

import gzip
import hashlib
import math
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowrank_jax.errors import MissingFile, UserError
from train.data.own_arrays import Arrays

_BLOCK = 2**20


class File(NamedTuple):
    """A file as it is published.

    Args:
      name: In its folder, and at the end of its address.
      size: In bytes.
      sha256: Of what it holds.
    """

    name: str
    size: int
    sha256: str


class Original(NamedTuple):
    """A set in its original files.

    Args:
      url: Where they lie.
      files: Of IDX: images and labels to train on, then those of the test; of
        CIFAR-10: the archive.
      image_shape: (x, y, c).
    """

    url: str
    files: tuple[File, ...]
    image_shape: tuple[int, int, int] = (28, 28, 1)


def _idx(url: str, *about: tuple[int, str]) -> Original:
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    return Original(url, tuple(map(File, names, *zip(*about, strict=True))))


ORIGINALS: dict[str, Original] = {
    "cifar10": Original(
        "https://www.cs.toronto.edu/~kriz",
        (
            File(
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        (32, 32, 3),
    ),
    "fashion_mnist": _idx(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
    "mnist": _idx(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
}
"""The sets by the name that TFDS gives them; their classes are ten each."""


def is_there(name: str, root: Path) -> bool:
    """Returns whether a set, or a part of it, lies below a folder."""
    return name in ORIGINALS and any(
        (root / name / file.name).is_file() for file in ORIGINALS[name].files
    )


def read(original: Original, folder: Path) -> tuple[Arrays, Arrays]:
    """Returns the training and the test examples, "image" and "label".

    Raises:
      MissingFile: Not all of its files are in the folder.
      UserError: One is damaged.
    """
    for file in original.files:
        check(file, folder / file.name)
    paths = [folder / file.name for file in original.files]
    if len(paths) == 1:
        return read_cifar(paths[0])
    arrays = [parse_idx(_unpacked(path), path) for path in paths]
    return pair(*arrays[:2], paths[0]), pair(*arrays[2:], paths[2])


def check(file: File, path: Path) -> None:
    """Raises UserError where a file is missing or not as it was published."""
    if not path.is_file():
        raise MissingFile(f"{path}: must be there, got nothing. Fetch it again.")
    size = path.stat().st_size
    if size != file.size:
        raise UserError(
            f"{path}: must have {file.size:,} bytes, got {size:,}. It is damaged;"
            " remove it, and fetch it again."
        )
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"{path}: must have the sha256 {file.sha256}, got {digest.hexdigest()}. It"
            " is damaged, or another file; remove it, and fetch it again."
        )


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, f"no gzip ({error})") from error


def parse_idx(content: bytes, where: Path) -> np.ndarray:
    """Returns the array of an IDX file.

    Raises:
      UserError: It is none of uint8, or of another size than its head says.
    """
    axes = content[3] if len(content) > 3 else 0
    if content[:3] != b"\x00\x00\x08" or not 1 <= axes <= 3:
        raise _damaged(where, f"the head {content[:4].hex()}")
    head = 4 + 4 * axes
    shape = [int.from_bytes(content[n : n + 4], "big") for n in range(4, head, 4)]
    if len(content) != head + math.prod(shape):
        raise _damaged(where, f"{len(content):,} bytes for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def pair(images: np.ndarray, labels: np.ndarray, where: Path) -> Arrays:
    """Returns the examples of a split.

    Raises:
      UserError: Images and labels do not fit together.
    """
    if (images.ndim, labels.ndim) != (3, 1) or len(images) != len(labels):
        raise _damaged(where, f"images {images.shape} and labels {labels.shape}")
    return {"image": images[..., None], "label": labels.astype(np.int32)}


def read_cifar(path: Path) -> tuple[Arrays, Arrays]:
    """Returns the training and the test examples of CIFAR-10's binary archive.

    Raises:
      UserError: It lacks files, or one has another form.
    """
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is not None and member.name.endswith(".bin"):
                    batches[Path(member.name).name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, f"no archive ({error})") from error
    train = [f"data_batch_{n}.bin" for n in range(1, 6)]
    if missing := {*train, "test_batch.bin"} - batches.keys():
        raise _damaged(path, f"no {', '.join(sorted(missing))}")
    parts = [batches[name] for name in train]
    return (
        parse_cifar(b"".join(parts), path),
        parse_cifar(batches["test_batch.bin"], path),
    )


def parse_cifar(content: bytes, where: Path) -> Arrays:
    """Returns the examples of CIFAR-10's records.

    Raises:
      UserError: Not whole records, or labels above 9.
    """
    size = 1 + 3 * 32 * 32
    if not content or len(content) % size:
        raise _damaged(where, f"{len(content):,} bytes, no records of {size:,}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    if rows[:, 0].max() > 9:
        raise _damaged(where, f"the label {rows[:, 0].max()}")
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    image = np.ascontiguousarray(images)
    return {"image": image, "label": rows[:, 0].astype(np.int32)}


def _damaged(path: Path, got: str) -> UserError:
    return UserError(
        f"{path}: must be a file as it was published, got {got}. It is damaged; remove"
        " it, and fetch it again."
    )
