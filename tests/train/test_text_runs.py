"""Runs on text through the one loop: the same whatever is under them, and cut."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import support
from cutting import load
from reference import relative_error
from text_configs import make_config, write

from lowrank_jax import checkpoint, export
from train import checkpoints, loop, opening, writing

STEPS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "a.txt")


def train(
    text: Path, workdir: Path, mesh: Mapping[str, int] | None = None, **model_args: Any
) -> list[dict[str, Any]]:
    """The frontier after some dense and as many nested steps with two layers."""
    config = make_config(text)
    config["mesh"] |= mesh or {}
    config["data"]["batch_size"] = 16  # four parts on four shares of a mesh
    config["model"]["args"] |= {"depth": 2, **model_args}
    for phase in config["phases"]:
        phase["until"] = {"steps": STEPS}
    support.put(config, "eval_fractions", [1.0, 0.5])
    return loop.train_and_evaluate(config, workdir)["frontier"]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, train(text, workdir)


@pytest.mark.slow
def test_a_scanned_run_is_the_unrolled_one(run, text, tmp_path):
    """The same seed, the same steps: the same figures, with stacked factors."""
    scanned = train(text, tmp_path / "scanned", scan=True)
    for ours, theirs in zip(scanned, run[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert (ours["params"], ours["macs"]) == (theirs["params"], theirs["macs"])
    assert scanned[1]["ranks"]["blocks/up"] == [4, 4]
    assert run[1][1]["ranks"]["blocks/0/up"] == 4


@pytest.mark.slow
def test_on_many_devices_it_is_the_same_run(run, text, tmp_path):
    """Rows of a batch, tables and factors split; the last window is padded."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    with support.all_devices():
        split = train(text, tmp_path / "split", mesh)
    for ours, theirs in zip(split, run[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["ranks"] == theirs["ranks"]


def test_a_run_of_text_is_cut_and_writes(run, tmp_path):
    """Every size has the figures of its prefix, and goes on with a prompt."""
    workdir, frontier = run
    selector = {"name": "rank_fraction", "args": {"value": 0.5}}
    cut = checkpoints.truncate_checkpoint(workdir, tmp_path / "cut", selector)
    half = frontier[1]
    assert (cut["ranks"], cut["params"]) == (half["ranks"], half["params"])
    figures = opening.open_model(tmp_path / "cut").figures("validation")
    assert figures["loss"] == pytest.approx(half["loss"], rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(half["loss"]), rel=1e-5)
    texts = [
        writing.open_writer(*opened).write(["abc"], max_tokens=20)
        for opened in ((workdir, selector), (tmp_path / "cut",))
    ]
    assert texts[0] == texts[1] and len(texts[0]["texts"][0]) == 20


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2])
def test_a_program_of_a_text_model(run, text, tmp_path, fraction):
    """Of whole windows, for a batch of any size: its logits are the cut model's."""
    selector = {"name": "rank_fraction", "args": {"value": fraction}}
    for name, chosen in (("program", "stablehlo"), ("cut", "orbax")):
        checkpoints.truncate_checkpoint(
            run[0], tmp_path / name, selector, format=chosen
        )
    program = (tmp_path / "program" / "model.stablehlo").read_bytes()
    model = load(tmp_path / "cut")
    context = make_config(text)["data"]["args"]["context"]
    windows = np.random.default_rng(0).integers(0, 5, (3, context), np.int32)
    logits = export.from_stablehlo(program)(windows)
    assert relative_error(logits, model(windows)) <= 1e-6


def test_the_binary_writes_at_any_rank(run, tmp_path):
    """A fraction, a file of ranks, and both prompts in one call."""
    workdir, frontier = run
    (tmp_path / "ranks.json").write_text(json.dumps(frontier[1]["ranks"]))
    call = ("train.generate", f"--checkpoint={workdir}", "--prompt=abc", "--prompt=c")
    ended = commands.run(
        {
            "whole": (*call, "--max_tokens=9"),
            "half": (*call, "--max_tokens=9", "--rank_fraction=0.5"),
            "ranks": (*call, "--max_tokens=9", f"--ranks={tmp_path / 'ranks.json'}"),
        }
    )
    whole, half, ranks = (ended[name].result for name in ("whole", "half", "ranks"))
    assert [len(text) for text in half["texts"]] == [9, 9]
    assert half == ranks
    assert (half["params"], whole["params"]) == tuple(
        row["params"] for row in (frontier[1], frontier[0])
    )


def test_the_tokenizer_travels(run, tmp_path, text):
    """In every checkpoint, so that the text is not needed to write."""
    saved = checkpoint.open_checkpoint(run[0])
    assert saved.metadata["facts"]["tokenizer"]["characters"] == "\n abc"
    text.rename(tmp_path / "away.txt")
    try:
        assert writing.open_writer(run[0]).write(["abc"], max_tokens=3)["texts"]
    finally:
        (tmp_path / "away.txt").rename(text)
