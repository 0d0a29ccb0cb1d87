"""Places that cannot be written are found before any work; one process owns a folder;
files are the old ones or the new ones."""

import concurrent.futures
import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import SmallDisk

from lowrank_jax.errors import UserError
from train import folders

ROOT = Path(__file__).parents[2]


def test_a_folder_that_can_be_made_is_left_unmade(tmp_path: Path):
    folders.check_writable(tmp_path)
    folders.check_writable(tmp_path / "a/b/c")
    folders.check_new_file(tmp_path / "a/picture.png")
    assert not list(tmp_path.iterdir())


def test_relative_to_the_working_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.check_writable("runs/new")
    folders.check_new_file("picture.png")


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match=f"{place}, where .*/file is a file"):
            folders.check_writable(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run/a"])
def test_a_place_that_takes_no_files(place):
    """Read-only or not of the disk, even for root."""
    if not os.path.isdir(os.path.dirname(place.removesuffix("/a"))):
        pytest.skip("only on Linux")
    with pytest.raises(UserError, match=f"can be written, got {place} "):
        folders.check_writable(place)


def test_a_picture_needs_a_name(tmp_path: Path):
    with pytest.raises(UserError, match="must be a file, got the folder"):
        folders.check_new_file(tmp_path)


def test_room_on_the_disk(tmp_path: Path):
    folders.check_space(tmp_path / "new", 1)
    with pytest.raises(UserError, match="1,000,000,000,000,000,000,000 free bytes"):
        folders.check_space(tmp_path / "new", 10**21)


HOLDER = """
import sys, time
from train import folders
with folders.lock(sys.argv[1]), folders.claim(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which owns `run` and is making `cut`."""
    words = [sys.executable, "-c", HOLDER, tmp_path / "run", tmp_path / "cut"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_lock_dies_with_its_owner(tmp_path: Path, holder):
    """While it lives it is named and nobody else gets in; SIGKILL ends the lock."""
    run, cut = tmp_path / "run", tmp_path / "cut"
    assert folders.owner(run) == (holder.pid, socket.gethostname())
    for lock, folder in ((folders.lock, run), (folders.claim, cut)):
        with pytest.raises(UserError) as caught, lock(folder):
            pytest.fail("two processes own one folder")
        assert str(caught.value) == (
            f"must be of one run at a time, got {folder}, which process {holder.pid} on"
            f" {socket.gethostname()} writes. Stop it, or name another."
        )
    holder.kill()
    holder.wait()
    assert folders.owner(run) is None
    for lock, folder in ((folders.lock, run), (folders.claim, cut)):
        with lock(folder):
            pass
    assert not cut.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_a_lock_leaves_nothing_behind(tmp_path: Path):
    """But what was written under it."""
    with folders.lock(tmp_path / "a/b"):
        assert folders.owner(tmp_path / "a/b").pid == os.getpid()
    with folders.claim(tmp_path / "c/d"):
        assert not (tmp_path / "c/d").exists()
    assert not list(tmp_path.iterdir())
    with folders.lock(tmp_path / "a"):
        (tmp_path / "a/config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]


def test_one_owner_at_a_time(tmp_path: Path):
    """Eight threads for one folder, with its file removed and made all the time.

    Locks of one process's open files exclude each other as those of several do.
    """
    inside, most, entered = [], [], []

    def enter(number: int) -> None:
        for _ in range(25):
            with contextlib.suppress(UserError), folders.lock(tmp_path / "run"):
                inside.append(number)
                most.append(len(inside))
                entered.append(number)
                folders.owner(tmp_path / "run")
                inside.remove(number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert max(most) == 1 and len(entered) >= 25
    assert not list(tmp_path.rglob("*.lock"))


def test_a_file_is_the_old_one_or_the_new(tmp_path: Path):
    """Whenever it is read while it is written over and over."""
    path, texts = tmp_path / "file", [letter * 100_000 for letter in "ab"]
    folders.write_atomically(path, texts[0])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [folders.write_atomically(path, texts[n % 2]) for n in range(100)]
        )
        read = 0
        while not writing.done():
            assert path.read_text() in texts
            read += 1
        writing.result()
    assert read > 10
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_file(small_disk: SmallDisk):
    """The error names the file; what was begun is removed; there is room later."""
    path = small_disk.folder / "file"
    folders.write_atomically(path, "old")
    small_disk.fill()
    with pytest.raises(OSError, match=f"No space left.*'{path}'") as caught:
        folders.write_atomically(path, "new" * 10_000)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    small_disk.empty()
    folders.write_atomically(path, "new")
    assert [file.name for file in small_disk.folder.iterdir()] == ["file"]


def test_a_disk_that_became_read_only(small_disk: SmallDisk):
    path = small_disk.folder / "run/file"
    with folders.lock(path.parent):
        folders.write_atomically(path, "old")
    small_disk.write_protect()
    with pytest.raises(OSError, match="Read-only file system"):
        folders.write_atomically(path, "new")
    with pytest.raises(UserError, match="can be written, got .*Read-only file sys"):
        folders.check_writable(path.parent)
    assert path.read_text() == "old"
