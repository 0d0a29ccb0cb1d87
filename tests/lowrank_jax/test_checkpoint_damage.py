"""Checkpoints: no damage to a file gives other numbers than were saved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import saved_models
from flax import nnx
from saved_models import LOWER, arrays, assert_same, low_rank, structure

from lowrank_jax import checkpoint
from lowrank_jax.errors import DamagedCheckpoint, MissingFile
from lowrank_jax.pieces import seal

folder = saved_models.folder
FLIPS = 4
"""Bits turned over in each file."""


@pytest.fixture(scope="module", params=["uncut", "cut"])
def whole(request, folder, tmp_path_factory) -> Path:
    """A checkpoint of one step, as trained or cut."""
    if request.param == "uncut":
        return folder
    path = tmp_path_factory.mktemp("cut") / "model"
    saved = checkpoint.open_checkpoint(folder)
    model = checkpoint.load(saved, structure(), ranks=LOWER)
    checkpoint.save(path, model, step=5)
    return path


def files_of(folder: Path) -> list[Path]:
    """Every file, relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [file.relative_to(folder) for file in files]


def read(path: Path) -> tuple[dict, nnx.Module]:
    saved = checkpoint.open_checkpoint(path)
    return saved.metadata, checkpoint.load(saved, structure())


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def survives(damaged: Path, metadata: dict, model: nnx.Module) -> bool:
    """Whether a checkpoint reads as before; if not, it must say that it is damaged."""
    try:
        checkpoint.verify(checkpoint.open_checkpoint(damaged))
        found = read(damaged)
    except DamagedCheckpoint as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
        return False
    assert found[0] == metadata
    assert_same(found[1], model)
    return True


def test_a_flipped_bit_is_found_or_changes_nothing(whole, tmp_path):
    """In every file of a checkpoint; in those of ours it is always found."""
    rng = np.random.default_rng(0)
    expected = read(whole)
    found = {}
    for file in files_of(whole):
        size = (whole / file).stat().st_size
        for at in rng.choice(size, min(size, FLIPS), replace=False):
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            flip(copy / file, int(at), int(rng.integers(8)))
            found.setdefault(str(file), []).append(not survives(copy, *expected))
            shutil.rmtree(copy)
    ours = [name for name in found if "process_" in name or name.endswith("/metadata")]
    assert len(ours) == 5 and all(all(found[name]) for name in ours), found
    assert sum(map(len, found.values())) >= 40


@pytest.mark.parametrize("left", [0, 0.5, None], ids=["empty", "half", "missing"])
def test_a_file_that_is_cut_off_is_found_or_changes_nothing(whole, left, tmp_path):
    """A step without one of the two files that make it complete is no step at all."""
    expected = read(whole)
    for file in files_of(whole):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        if left is None:
            (copy / file).unlink()
        else:
            data = (copy / file).read_bytes()
            (copy / file).write_bytes(data[: int(len(data) * left)])
        marks = ("metadata/metadata", "_CHECKPOINT_METADATA")
        if left is None and str(file).endswith(marks):
            with pytest.raises(MissingFile, match="half-written"):
                read(copy)
        else:
            survived = survives(copy, *expected)
            assert survived == ("commit" in file.name or "_CHECK" in file.name), file
        shutil.rmtree(copy)


def test_without_its_checksum_a_flipped_bit_gives_other_numbers(folder, tmp_path):
    """The control: it is the checksums that find damage, nothing else does."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = copy / "5/params/process_0.json"
    about = json.loads(index.read_text())
    piece = about["pieces"]["first/factors/u"][0]
    flip(copy / "5/params/process_0.bin", piece["offset"] + 3)
    with pytest.raises(DamagedCheckpoint, match="first/factors/u") as error:
        read(copy)
    found = str(error.value).split("got ")[1][:8]
    piece["crc32"][0] = int(found, 16)
    index.write_text(json.dumps(seal(about)))
    model, expected = arrays(read(copy)[1]), arrays(read(folder)[1])
    different = [key for key in model if not np.array_equal(model[key], expected[key])]
    assert different == ["first/factors/u"]


def test_only_what_is_read_has_to_be_whole(folder, tmp_path):
    """Damage past the rank that is loaded is found when it is loaded, or verified."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    about = json.loads((copy / "5/params/process_0.json").read_text())
    piece = about["pieces"]["half/factors/u"][0]
    last = piece["offset"] + piece["ends"][-1] * piece["row_bytes"] - 1
    flip(copy / "5/params/process_0.bin", last)
    saved = checkpoint.open_checkpoint(copy)
    found = checkpoint.load(saved, structure(), ranks=LOWER)
    expected = checkpoint.open_checkpoint(folder)
    assert_same(found, checkpoint.load(expected, structure(), ranks=LOWER))
    for attempt in (checkpoint.verify, lambda s: checkpoint.load(s, structure())):
        with pytest.raises(DamagedCheckpoint, match="half/factors/u"):
            attempt(saved)


def test_the_checkpoint_before_a_damaged_one_is_named_and_used(folder, tmp_path):
    """A run goes on from it, and saves the damaged one's step again."""
    root = tmp_path / "run"
    writer = checkpoint.CheckpointWriter(root, keep=2)
    for step in (5, 6):
        writer.save(step, low_rank(), {})
    writer.close()
    flip(root / "6/params/process_0.bin", 40)
    assert [path.name for path in checkpoint.complete_steps(root)] == ["6", "5"]
    latest = checkpoint.open_checkpoint(root)
    message = (
        rf"checkpoint {root}/6: params/process_0.bin: array \S+: its checksum must be"
        rf" [0-9a-f]{{8}}, got [0-9a-f]{{8}}\. Use the one before it, {root}/5\."
    )
    with pytest.raises(DamagedCheckpoint, match=message):
        checkpoint.load(latest, structure())
    assert checkpoint.set_aside(latest.path).name == "6.damaged"
    before = checkpoint.open_checkpoint(root)
    assert_same(checkpoint.load(before, structure()), low_rank())
    writer = checkpoint.CheckpointWriter(root, keep=1)
    writer.save(6, low_rank(), {})
    writer.close()
    assert sorted(path.name for path in root.iterdir()) == ["6", "6.damaged"]
    checkpoint.verify(checkpoint.open_checkpoint(root))
    assert checkpoint.set_aside(root / "6").name == "6.damaged.1"
