"""The writer of checkpoints: what it keeps, and what interrupts it."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from lowrank_jax import checkpoint
from lowrank_jax.errors import ExistingFile

ROOT = Path(__file__).resolve().parent.parent.parent
NAN = float("nan")
KEPT = {
    "latest": (dict(keep=2), [1, 2, 3, 4], [3, 4]),
    "more than there are": (dict(keep=5), [1, 2, 3], [1, 2, 3]),
    "three": (dict(keep=3), [None] * 5, [3, 4, 5]),
    "all": (dict(keep=None, keep_best=1), [1, 2, 3], [1, 2, 3]),
    "best": (dict(keep=1, keep_best=2), [0.5, 0.9, 0.7, 0.1], [2, 3, 4]),
    "lowest": (
        dict(keep=1, keep_best=1, higher_is_better=False),
        [0.5, 0.1, 0.7, 0.4],
        [2, 4],
    ),
    "latest and best": (dict(keep=2, keep_best=1), [0.1, 0.2, 0.3], [2, 3]),
    "ties": (dict(keep=1, keep_best=1), [0.5, 0.5, 0.5, 0.1], [3, 4]),
    "no number": (
        dict(keep=1, keep_best=1),
        [0.2, NAN, None, float("inf"), 0.1, None],
        [1, 6],
    ),
    "no figures": (dict(keep=1, keep_best=3), [None, None, None], [3]),
}


def small(value: float = 0.0) -> nnx.Module:
    return nnx.Dict(bias=nnx.Param(jnp.full(3, float(value))))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize("case", KEPT)
def test_the_last_and_the_best_are_kept(case, restart, tmp_path):
    """Whether or not the process was started again after each save."""
    options, figures, kept = KEPT[case]
    writer = checkpoint.CheckpointWriter(tmp_path, **options)
    for step, figure in enumerate(figures, 1):
        writer.save(step, small(step), {}, figure=figure)
        if restart:
            writer.close()
            writer = checkpoint.CheckpointWriter(tmp_path, **options)
    writer.close()
    assert steps(tmp_path) == kept
    for path in checkpoint.complete_steps(tmp_path):
        saved = checkpoint.open_checkpoint(path)
        found = checkpoint.load(saved, nnx.eval_shape(small))
        assert saved.step == found["bias"][0] == int(path.name)


def test_a_step_is_not_saved_twice(tmp_path):
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save(1, small(1.0), {})
    with pytest.raises(ExistingFile, match="checkpoint .*1: must not exist yet"):
        writer.save(1, small(2.0), {})
    writer.close()
    found = checkpoint.load(checkpoint.open_checkpoint(tmp_path), nnx.eval_shape(small))
    assert found["bias"][0] == 1


KILLED = """
import os, signal, sys
from flax import nnx
import jax.numpy as jnp
from lowrank_jax import checkpoint, pieces
sys.path.append("tests/lowrank_jax")
from test_checkpoint_writer import small

writer = checkpoint.CheckpointWriter(sys.argv[1])
writer.save(1, small(1.0), {})
writer.wait()
synced, calls = os.fsync, []

def kill(*args):
    calls.append(args)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return synced(*args)

os.fsync = kill
writer.save(2, small(2.0), {}, {"more": {"x": jnp.ones(1000)}})
writer.close()
"""


@pytest.mark.parametrize("call", [1, 4])
def test_a_save_that_was_killed_is_no_checkpoint(call, tmp_path):
    """What it left goes when a writer comes; the step is saved again."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(call)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = {path.name for path in tmp_path.iterdir()} - {"1"}
    assert left.startswith("2.") and list((tmp_path / left).rglob("process_0.bin"))
    assert checkpoint.open_checkpoint(tmp_path).step == 1
    writer = checkpoint.CheckpointWriter(tmp_path, keep=2)
    writer.save(2, small(3.0), {})
    writer.close()
    assert steps(tmp_path) == [1, 2]
    saved = checkpoint.open_checkpoint(tmp_path)
    checkpoint.verify(saved)
    assert checkpoint.load(saved, nnx.eval_shape(small))["bias"][0] == 3


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of one MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_is_an_os_error_and_spares_what_is_there(small_disk):
    """It comes up at the next save, wait or close. Nothing goes before what is newer is
    complete; once there is room, the old one goes."""
    model = nnx.Dict(kernel=nnx.Param(jnp.ones((100, 1000))))
    writer = checkpoint.CheckpointWriter(small_disk / "run", keep=1)
    with pytest.raises(OSError) as error:
        for step in range(1, 6):
            writer.save(step, model, {}, {"more": {"x": jnp.ones((step, 50_000))}})
    assert error.value.errno == errno.ENOSPC and step > 1
    writer.close()
    saved = checkpoint.open_checkpoint(small_disk / "run")
    checkpoint.verify(saved)
    assert saved.step < step
    writer = checkpoint.CheckpointWriter(small_disk / "run", keep=1)
    writer.save(9, small(), {})
    writer.close()
    assert steps(small_disk / "run") == [9]


def test_a_folder_that_cannot_be_written_is_an_os_error(small_disk):
    """Read only, for root as well."""
    writer = checkpoint.CheckpointWriter(small_disk / "run")
    writer.save(1, small(), {})
    writer.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError) as error:
        writer.save(2, small(), {})
        writer.wait()
    assert error.value.errno == errno.EROFS
    checkpoint.verify(checkpoint.open_checkpoint(small_disk / "run"))
