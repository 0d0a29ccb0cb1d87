"""Malformed metadata and rank files: one error of ours, and nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import mutations
import pytest
import support
from hypothesis import strategies as st

from configs import common
from lowrank_jax import checkpoint
from lowrank_jax.pieces import seal
from train import checkpoints, opening, selecting
from train.config import to_json
from train.run import open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint as a run leaves it, of a model that was never trained."""
    phase = common.phase(
        name="only",
        until={"steps": 4},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
    )
    model = common.named("mlp", hidden=(8,))
    run = open_run(to_json(support.make_config(phase, model=model, batch_size=64)))
    path = tmp_path_factory.mktemp("fuzz") / "saved"
    checkpoint.save(path, run.fresh_model(), step=3, metadata=run.metadata())
    return path


def write_metadata(folder: Path, metadata: Any) -> None:
    """Replaces the metadata of a checkpoint and signs them anew, so that what is
    behind the digest is tried."""
    file = folder / "3" / "metadata" / "metadata"
    file.write_text(json.dumps(seal(metadata)))


KNOWN: list[tuple[str, mutations.Edits]] = [
    ("open", [(("config",), None)]),
    ("open", [(("config", "seed"), ...)]),
    ("open", [(("config", "mesh"), {"data_": -1})]),
    ("open", [(("facts", "arrays"), [True])]),
    ("truncate", [(("facts", "arrays", "image", "shape", 0), "json:")]),
    ("open", [(("rank_rules",), [3, 1.0])]),
    ("open", [(("rank_axes", "hidden/0/factors/v", 0), 2)]),
    ("truncate", [(("ranks", "head"), "(a+)+$")]),
    ("open", [(("max_ranks", "hidden/0"), {"image": 1})]),
    ("open", [(("arrays", "params", "hidden/0/bias"), [[8]])]),
    ("open", [(("arrays", "params", "head/factors/v", 1), "8\x90§\x15)°")]),
    ("truncate", [(("arrays", "model_state"), "merge")]),
    ("open", [(("run",), [5])]),
    ("truncate", [(("run",), {"selected": {"family": [[0.5]]}})]),
    ("open", [(("run",), {"selected": {"family": [[2.0, {"head": 1}]]}})]),
    ("truncate", [(("run",), {"selected": {"family": [[0.5, {"head": "a"}]]}})]),
]
"""What once ended in an error from inside a library."""


@mutations.TIMES
def test_metadata_of_a_checkpoint(folder, tmp_path, times):
    """Opened, loaded at its ranks and at lower ones, evaluated and cut."""
    good = checkpoint.open_checkpoint(folder).metadata
    copy, output = tmp_path / "copy", tmp_path / "cut"
    shutil.copytree(folder, copy)
    selector = common.named("rank", value=2)
    uses = {
        "open": lambda: opening.open_model(copy),
        "truncate": lambda: checkpoints.truncate_checkpoint(copy, output, selector),
    }

    def check(case: tuple[str, mutations.Edits]) -> None:
        use, edits = case
        write_metadata(copy, mutations.changed(good, edits))
        refused = mutations.refused(uses[use])
        assert output.exists() == (use == "truncate" and not refused)
        shutil.rmtree(output, ignore_errors=True)

    cases = st.tuples(st.sampled_from(list(uses)), mutations.edits(good))
    mutations.campaign(check, cases, "metadata", times, KNOWN)


@mutations.TIMES
def test_rank_files(folder, tmp_path, times):
    """As JSON of something else, and as text or bytes that are no JSON."""
    good, output = {"head": 2, "hidden/0": 3}, tmp_path / "cut"
    file = tmp_path / "ranks.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)

        def cut() -> None:
            ranks = selecting.read_rank_file(file, "--ranks")
            selector = common.named("ranks", value=ranks)
            checkpoints.truncate_checkpoint(folder, output, selector)

        assert mutations.refused(cut) != output.exists()
        shutil.rmtree(output, ignore_errors=True)

    text = json.dumps(good).encode()
    changed = mutations.edits(good).map(lambda edits: mutations.changed(good, edits))
    damaged = st.tuples(st.integers(0, len(text)), st.binary(max_size=3)).map(
        lambda damage: text[: damage[0]] + damage[1] + text[damage[0] + 1 :]
    )
    cases = changed.map(lambda value: json.dumps(value).encode()) | damaged
    known = [b'{"head": 2, "head": 3}', b"[" * 100_000, b'{"head": 1e400}', b"\xff"]
    known += [b'{"head": ' + b"9" * 5000 + b"}", b"", b"\xef\xbb\xbf{}", b"null"]
    mutations.campaign(check, cases, "rank files", times, known)
