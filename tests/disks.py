"""Disks of a few megabytes in memory, to be filled and write-protected by tests."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class NoDisk(RuntimeError):
    """This machine lets us mount nothing."""


class SmallDisk(NamedTuple):
    """A file system of its own.

    Args:
      folder: Where it is mounted.
    """

    folder: Path

    def fill(self, *, leaving: int = 0) -> None:
        """Fills the disk but for so many bytes."""
        about = os.statvfs(self.folder)
        room = about.f_bavail * about.f_frsize - leaving
        with self._ballast.open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):  # a little less was free
                for _ in range(max(room, 0) // 4096):
                    file.write(bytes(4096))

    def empty(self) -> None:
        """Removes what `fill` wrote."""
        self._ballast.unlink(missing_ok=True)

    def write_protect(self, protect: bool = True) -> None:
        """Makes the disk read-only, or writable again."""
        how = "remount,ro" if protect else "remount,rw"
        _mount("-o", how, str(self.folder))

    @property
    def _ballast(self) -> Path:
        return self.folder / ".ballast"


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 1) -> Iterator[SmallDisk]:
    """Mounts a small disk on a folder, made if missing.

    Raises:
      NoDisk: We may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*words: str) -> None:
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoDisk(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise NoDisk(error.stderr.strip()) from error
