"""Checkpoints: what is neither saved nor loaded, and refusals that help."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import saved_models
from flax import nnx
from saved_models import Net, Scanned, low_rank, structure

from lowrank_jax import checkpoint
from lowrank_jax.errors import DamagedCheckpoint, UserError
from lowrank_jax.pieces import seal
from lowrank_jax.surgery import truncate

folder = saved_models.folder


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"again": 9, "half": 6}, r"(?s)again: .*\[0, 4\].*half: .*\[0, 5\]"),
        ({"again": 5}, r"again: .*\[0, 4\].*masked do not come back"),
        ({"conv": [1, 4]}, r"conv: .*\[0, \[1, 3\]\]"),
        ({"conv": [2, 1]}, r"conv: .*\[0, \[1, 3\]\]"),
        ({"again": True}, "again: rank must be a whole number, got True"),
        ({"body": 1}, r"got \['body'\]"),
    ],
)
def test_ranks_above_the_stored_ones_are_refused(ranks, message, folder):
    """Nothing is padded; all offenders are named."""
    saved = checkpoint.open_checkpoint(folder)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved, structure(), ranks=ranks)


def test_a_rank_cannot_be_loaded_back_after_a_cut(tmp_path):
    """The limit is what is in the file, not what the model could have."""
    checkpoint.save(tmp_path / "cut", truncate(low_rank(), {"again": 2}))
    saved = checkpoint.open_checkpoint(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"again: rank must be in \[0, 2\], got 3"):
        checkpoint.load(saved, structure(), ranks={"again": 3})


def test_two_arrays_with_one_path_are_refused_by_name(tmp_path):
    """(bug 8) "x/y" next to "x" that holds "y": nothing is lost in silence."""
    inner = nnx.Dict(y=nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
    model = nnx.Dict({"x": inner, "x/y": nnx.LayerNorm(2, rngs=nnx.Rngs(0))})
    with pytest.raises(UserError, match=r"got several for \['x/y/bias', 'x/y/scale'\]"):
        checkpoint.save(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


class Longer(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.more = nnx.LayerNorm(3, rngs=rngs)


OTHERS = {
    "width": (
        lambda: structure(width=9),
        ["params/again/factors/u", "params/first/bias", "params/half/factors/u"],
    ),
    "narrow": (lambda: structure(width=7), ["params/again/factors/v"]),
    "dtype": (
        lambda: structure(dtype=jnp.float32),
        ["params/half/bias", "params/half/factors/v", "bfloat16", "float32"],
    ),
    "scales": (lambda: structure(with_s=True), ["params/conv/factors/s"]),
    "more": (lambda: structure(Longer), ["params/more/bias", "not in the checkpoint"]),
    "layers": (lambda: structure(Scanned), ["['layers']", "'again'"]),
    "dense": (lambda: nnx.eval_shape(lambda: Net(nnx.Rngs(0))), ["[]", "'again'"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused_by_path(case, folder):
    """(7) Other sizes, wider or narrower, dtypes, layers: all differences are named."""
    build, names = OTHERS[case]
    saved = checkpoint.open_checkpoint(folder)
    for ranks in (None, {"again": 1} if case not in ("layers", "dense") else {}):
        with pytest.raises(ValueError) as error:
            checkpoint.load(saved, build(), ranks=ranks)
        for name in (*names, str(folder)):
            assert name in str(error.value), str(error.value)


def test_values_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    """In the caller's own thread, with nothing left behind that looks complete."""
    writer = checkpoint.CheckpointWriter(tmp_path / "run")
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, low_rank(Scanned), {"config": object()})
    writer.close()
    assert not list((tmp_path / "run").iterdir())


def test_an_existing_folder_is_refused(tmp_path):
    """Even an empty one: nothing is overwritten or mixed."""
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"there.*Nothing is overwritten"):
        checkpoint.save(tmp_path / "there", low_rank(Scanned))
    with pytest.raises(FileExistsError, match="must not exist yet, got .*there"):
        checkpoint.check_new_folder(tmp_path / "there")
    checkpoint.check_new_folder(tmp_path / "not there")


def metadata_file(folder: Path) -> Path:
    return folder / "5" / "metadata" / "metadata"


def edit(folder: Path, sealed: bool = True, **changes: Any) -> None:
    metadata = json.loads(metadata_file(folder).read_text())
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    metadata = seal(metadata) if sealed else metadata
    metadata_file(folder).write_text(json.dumps(metadata))


def half_written(folder: Path) -> None:
    (folder / "5").rename(folder / "5.orbax-checkpoint-tmp")


BROKEN = {
    "missing": (shutil.rmtree, FileNotFoundError, "not there"),
    "a file": (
        lambda f: (shutil.rmtree(f), f.write_text("")),
        FileNotFoundError,
        "must be a folder",
    ),
    "empty": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        FileNotFoundError,
        "complete checkpoint",
    ),
    "foreign": (
        lambda f: (shutil.rmtree(f / "5"), (f / "model.bin").touch()),
        FileNotFoundError,
        "model.bin",
    ),
    "temporary": (half_written, FileNotFoundError, "half-written"),
    "unmarked": (
        lambda f: (f / "5" / "_CHECKPOINT_METADATA").unlink(),
        FileNotFoundError,
        "half-written",
    ),
    "no metadata": (
        lambda f: metadata_file(f).unlink(),
        FileNotFoundError,
        "half-written",
    ),
    "broken JSON": (
        lambda f: metadata_file(f).write_text('{"step": 5,'),
        DamagedCheckpoint,
        "must be JSON",
    ),
    "other JSON": (
        lambda f: metadata_file(f).write_text("[1, 2]"),
        DamagedCheckpoint,
        "not another's",
    ),
    "binary": (
        lambda f: metadata_file(f).write_bytes(b"\xff\xfe\x00"),
        DamagedCheckpoint,
        "must be JSON",
    ),
    "no version": (
        lambda f: edit(f, format_version=None),
        ValueError,
        "must be of format 3, got None",
    ),
    "newer": (
        lambda f: edit(f, format_version=4, library_version="9.9"),
        ValueError,
        r"must be of format 3, got 4(.|\n)*9\.9",
    ),
    "older": (
        lambda f: edit(f, False, format_version=2, library_version="0.1", sha256=None),
        ValueError,
        r"must be of format 3, got 2(.|\n)*0\.1",
    ),
    "no digest": (
        lambda f: edit(f, False, sha256=None),
        DamagedCheckpoint,
        "digest must be None",
    ),
    "no ranks": (
        lambda f: edit(f, False, ranks=None),
        DamagedCheckpoint,
        r"metadata: its digest must be \w+, got \w+\. Use another",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_checkpoint_gives_one_clear_error(case, folder, tmp_path):
    """It names the path and the way out."""
    damage, kind, message = BROKEN[case]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    checkpoint.open_checkpoint(copy)
    damage(copy)
    with pytest.raises(kind, match=message) as error:
        checkpoint.open_checkpoint(copy)
    assert isinstance(error.value, UserError) and str(copy) in str(error.value)


def test_an_older_complete_step_stands_in_for_a_broken_one(folder, tmp_path):
    """A run that was killed while saving step 7 goes on from step 5."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "5", copy / "6")
    shutil.copytree(copy / "5", copy / "7.orbax-checkpoint-tmp")
    (copy / "6" / "_CHECKPOINT_METADATA").unlink()
    saved = checkpoint.open_checkpoint(copy)
    assert saved.path.name == "5"
    checkpoint.load(saved, structure())
