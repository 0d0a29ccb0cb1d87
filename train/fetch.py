"""Fetches the original files of a data set, without TensorFlow: `python -m
train.fetch mnist --data_dir=DIR`.

Each file is checked by its size and sha256; what is there already stays, and what was
cut off goes on. Then `config.data.name="mnist"` finds them in `config.data.data_dir`
or TFDS_DATA_DIR. Ends with one line of JSON: `{"folders": {NAME: FOLDER}}`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.fetch")

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from absl import flags

from lowrank_jax import errors
from lowrank_jax.errors import UserError, unknown
from train import binary, folders
from train.data import original_files, tfds_sets
from train.data.original_files import ORIGINALS, File, Original
from train.report import logs

_BLOCK = 2**20
_SECONDS = 30.0
"""To wait for a server that says nothing."""


def fetch(original: Original, folder: Path, url: str | None = None) -> None:
    """Fetches the files of a set into a folder; those that are there are checked.

    Args:
      original: The set.
      folder: Made if missing.
      url: Where the files lie, if elsewhere.

    Raises:
      UserError: A server that does not answer, or gives another file.
    """
    folders.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in original.files:
        path = folder / file.name
        if not path.exists():
            address = f"{(url or original.url).rstrip('/')}/{file.name}"
            with logs.stage(f"fetching {address}, {file.size / 1e6:.1f} MB"):
                part = path.with_name(f"{file.name}.part")
                _download(address, file, part)
                try:
                    original_files.check(file, part)
                except UserError as error:
                    part.unlink()
                    raise UserError(f"{address}: {error}") from error
                part.replace(path)
        original_files.check(file, path)


def _download(address: str, file: File, part: Path) -> None:
    """Writes what a server sends behind what is there already, if it can go on."""
    there = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "lowrank_jax"})
        if there:
            request.add_header("Range", f"bytes={there}-")
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            goes_on = there and answer.status == 206
            with part.open("ab" if goes_on else "wb") as stream:
                while block := answer.read(_BLOCK):
                    stream.write(block)
                    if stream.tell() > file.size:
                        break  # another file; the check says so
                else:
                    if answer.length:  # what was promised and did not come
                        raise OSError("a connection that ended early")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # all of it is there
            return
        raise _unreachable(address, part, error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreachable(address, part, error) from error


def _unreachable(address: str, part: Path, error: Exception) -> UserError:
    reason = getattr(error, "reason", None) or error
    return UserError(
        f"{address}: must be an address that answers, got {reason}. Try again, name a"
        f" mirror by --url, or put the file into {part.parent} yourself."
    )


def _define_flags() -> None:
    flags.DEFINE_string(
        "data_dir",
        "",
        "Where sets lie; TFDS_DATA_DIR or ~/tensorflow_datasets if not given.",
    )
    flags.DEFINE_string("url", None, "Folder of a mirror that has the files.")


def _main(*names: str) -> None:
    for name in names:
        if name not in ORIGINALS:
            raise UserError(f"NAME: {unknown('a set', name, sorted(ORIGINALS))}")
    root, found = tfds_sets.resolve_data_dir(flags.FLAGS.data_dir), {}
    for name in names:
        with errors.at(f"data set {name!r}"):
            fetch(ORIGINALS[name], root / name, flags.FLAGS.url)
        found[name] = str(root / name)
    logs.emit({"folders": found})


if __name__ == "__main__":
    _define_flags()
    binary.run(
        _main,
        takes="NAME",
        examples=(
            "train.fetch mnist",
            "train.fetch mnist cifar10 --data_dir=data --url=https://example.org/files",
        ),
    )
