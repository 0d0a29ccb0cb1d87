"""Folders and files to be written: whether they can be, before any work is done."""

import os
import shutil
import tempfile
from pathlib import Path

from lowrank_jax.errors import UserError


def check_writable(folder: str | os.PathLike) -> None:
    """Checks that a folder can be made, where it is missing, and written.

    A file of one byte is written and removed in the folder, or in the nearest folder
    above it that is there; nothing stays.

    Raises:
      UserError: It cannot: a file is in the way, permissions, a read-only or full disk.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise UserError(
            f"must be in a folder, got {folder}, where {nearest} is a file. Name"
            " another place."
        )
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"must be a place that can be written, got {folder}"
            f" ({nearest}: {error.strerror}). Name another, or mend the disk or its"
            " permissions."
        ) from error


def check_new_file(path: str | os.PathLike) -> None:
    """Checks that a file can be written, before what it is to hold is computed.

    Raises:
      UserError: It is a folder, or its folder cannot be written.
    """
    if Path(path).is_dir():
        raise UserError(f"must be a file, got the folder {path}. Add a name to it.")
    check_writable(Path(path).parent)


def check_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Checks that the disk of a folder has room, before something large is written.

    Raises:
      UserError: It has less.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if free < num_bytes:
        raise UserError(
            f"must be on a disk with {num_bytes:,} free bytes, got {folder} with"
            f" {free:,}. Free some space, or name a folder elsewhere."
        )


def _nearest(path: str | os.PathLike) -> Path:
    """The path itself or, if nothing is there, the nearest one above it that is."""
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    return nearest
