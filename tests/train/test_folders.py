"""Places that cannot be written are found before any work, and nothing stays."""

import os
from pathlib import Path

import pytest

from lowrank_jax.errors import UserError
from train import folders


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
