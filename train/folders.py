"""Folders and files to be written: whether they can be, by whom, and all or nothing.

A folder that is written is locked by one process, with a lock of the kernel (`flock`)
on a file that says who it is: it is gone when its owner is, however that ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lowrank_jax.errors import UserError

LOCK = ".lock"
"""Name of the lock in a folder that is written."""
_ASIDE = ".aside"  # the suffix of folders that are being replaced
_PARTIAL = ".partial"  # the suffix of files that are being written
_SECONDS_OF_A_LOOK = 0.5  # whoever asks for the owner holds the lock for an instant


class Owner(NamedTuple):
    """The process that writes a folder.

    Args:
      pid: Its number, 0 where it has not said.
      host: Its machine.
    """

    pid: int
    host: str


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Owns a folder, made if missing, until the end of the context or of the process.

    A folder that it made and in which nothing was written is removed again.

    Raises:
      UserError: Another process owns it.
    """
    folder = Path(folder)
    with _held(folder / LOCK, folder):
        yield


@contextlib.contextmanager
def claim(folder: str | os.PathLike) -> Iterator[None]:
    """Owns a folder that is yet to be made, by a lock beside it.

    Raises:
      UserError: Another process is making it.
    """
    folder = Path(folder).absolute()
    with _held(folder.with_name(f".{folder.name}{LOCK}"), folder):
        yield


def owner(folder: str | os.PathLike) -> Owner | None:
    """Returns the process that owns a folder by `lock`, None where nobody does."""
    path = Path(folder) / LOCK
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said_by(path)
    finally:
        os.close(file)
    return None


@contextlib.contextmanager
def _held(path: Path, folder: Path) -> Iterator[None]:
    """Holds a lock on a file, made for it and removed after it."""
    missing = [path.parent, *path.parent.parents]
    missing = [parent for parent in missing if not parent.exists()]
    try:
        file = _locked(path, folder)
        try:
            said = Owner(os.getpid(), socket.gethostname())
            with naming(path):
                os.ftruncate(file, 0)
                os.write(file, json.dumps(said._asdict()).encode())
            yield
        finally:
            with contextlib.suppress(OSError):  # a disk that is read-only by now
                path.unlink()
            os.close(file)
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # it holds something
                parent.rmdir()


def _locked(path: Path, folder: Path) -> int:
    """Opens and locks a file; who looks at it for an instant is waited for."""
    deadline = time.monotonic() + _SECONDS_OF_A_LOOK
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, FileNotFoundError):
            if path.parent.is_file():
                raise
            continue  # its owner has just removed the folder, too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                os.close(file)
                raise _no_locks(folder, error) from error
            if time.monotonic() > deadline:
                os.close(file)
                raise _taken(folder, _said_by(path)) from None
        os.close(file)  # its owner has just removed it, or still holds it
        time.sleep(0.02)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that its path names now."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _taken(folder: Path, by: Owner) -> UserError:
    who = f"process {by.pid} on {by.host}" if by.pid else "another process"
    return UserError(
        f"must be of one run at a time, got {folder}, which {who} writes. Stop it, or"
        " name another."
    )


def _no_locks(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"must be on a disk with file locks, got {folder} ({error.strerror}). Name a"
        " folder on another disk."
    )


def _said_by(path: Path) -> Owner:
    """The owner as the lock's file says; it may not have said yet."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Owner(0, "")


def is_leftover(path: Path) -> bool:
    """Returns whether a file is a lock, or what a kill left of an atomic write."""
    return path.name == LOCK or (path.name[0] == "." and path.suffix == _PARTIAL)


def write_atomically(
    path: str | os.PathLike, text: str, *, durable: bool = True
) -> None:
    """Writes a file so that whoever reads it, at any time, finds the old or the new.

    Args:
      path: The file, of which there is one writer at a time.
      text: All of it.
      durable: Whether to wait until the disk has it, which a loss of power needs.

    Raises:
      OSError: The disk is full or read-only; it names the file, which is the old one.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with naming(path):
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(partial, path)
            if durable:
                _sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def make_way(folder: Path) -> Path:
    """Renames a folder that another is to replace; returns where it is now.

    Once the other is there, it can be removed; after a kill, `put_back` decides.
    """
    aside = folder.with_name(f".{folder.name}{_ASIDE}")
    return folder.rename(aside)


def put_back(parent: Path) -> None:
    """Gives folders that made way their names again, or removes them where what
    was to replace them is there."""
    for aside in parent.glob(f".*{_ASIDE}"):
        folder = parent / aside.name[1:].removesuffix(_ASIDE)
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts a file's name into the errors of a disk, which has it for some alone."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Waits until the disk knows a folder's names."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some disks sync no folders
            raise
    finally:
        os.close(file)


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
