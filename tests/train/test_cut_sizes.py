"""Truncation to several sizes at once, of dense checkpoints, and without writing."""

import json
from pathlib import Path
from typing import Any

import commands
import jax.numpy as jnp
import numpy as np
import pytest
import support
from cutting import FULL, load
from reference import relative_error

from configs import common
from lowrank_jax import checkpoint, export
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from train import checkpoints, drops, exporting, loop, opening, selecting
from train.timing import Timing

KNAPSACK = {"name": "knapsack", "args": {"measure": "macs"}}
SIZES = [0.5, 0.25, 0.75]
DENSE_MACS = 80 * 10 + 64 * 80


def macs(ranks: dict[str, int]) -> int:
    """Of the factored layers, each in its cheaper form."""
    return min(90 * ranks["head"], 800) + min(144 * ranks["hidden/0"], 5120)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("dense") / "run"
    optimizer = common.optimizer("adam", learning_rate=1e-2)
    phase = common.phase(name="only", until={"epochs": 3}, optimizer=optimizer)
    rules = [[".*", "dense"]]
    model = {"name": "mlp", "args": {"hidden": (80,)}}
    config = support.make_config(phase, model=model, rank_rules=rules)
    loop.train_and_evaluate(config, workdir)
    assert checkpoint.open_checkpoint(workdir).metadata["ranks"] == {}
    return workdir


@pytest.mark.parametrize("source", ["run", "dense_run"])
def test_sizes_are_nested_and_within_their_budgets(source, request, tmp_path):
    """One folder each; the larger know the smaller as their family, so that a fraction
    of one is the other, output for output."""
    path = request.getfixturevalue(source)
    found = checkpoints.truncate_checkpoint(
        path, tmp_path / "cut", KNAPSACK, sizes=SIZES
    )
    rows = {row["fraction"]: row for row in found["sizes"]}
    assert list(rows) == SIZES
    for size, row in rows.items():
        assert row["output"] == str(tmp_path / "cut" / f"{size:g}")
        assert macs(row["ranks"]) <= size * DENSE_MACS
        assert get_ranks(load(row["output"])) == row["ranks"]
    for small, large in ((0.25, 0.5), (0.5, 0.75)):
        low, high = rows[small]["ranks"], rows[large]["ranks"]
        assert all(low[path] <= high[path] for path in FULL)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    half = opening.open_model(rows[0.5]["output"])
    assert [fraction for fraction, _ in half.family] == [0.5]
    assert half.sweep([0.5])[0]["ranks"] == rows[0.25]["ranks"]
    again = checkpoints.truncate_checkpoint(
        rows[0.5]["output"],
        tmp_path / "again",
        {"name": "family", "args": {"measure": "macs", "fraction": 0.25}},
    )
    assert again["ranks"] == rows[0.25]["ranks"]
    small, cut = load(rows[0.25]["output"]), load(tmp_path / "again")
    np.testing.assert_array_equal(small(inputs), cut(inputs))


def test_a_dense_checkpoint_is_its_svd(dense_run, tmp_path):
    """Cut by energy, each kernel is the truncated SVD, by NumPy; what is written is
    low-rank, at the ranks that keep the share."""
    energy = {"name": "energy", "args": {"value": 0.8}}
    found = checkpoints.truncate_checkpoint(dense_run, tmp_path / "cut", energy)
    dense, cut = load(dense_run), load(tmp_path / "cut")
    kernels = {"head": dense.head.kernel[...], "hidden/0": dense.hidden[0].kernel[...]}
    assert found["ranks"].keys() == kernels.keys() == FULL.keys()
    for path, kernel in kernels.items():
        u, s, v = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
        rank = found["ranks"][path]
        kept = np.cumsum(s**2) / np.sum(s**2)
        assert kept[rank - 1] >= 0.8 > kept[rank - 2]
        factors = find_factors(cut)[path]
        product = np.asarray(factors.u[...]) @ np.asarray(factors.v[...])
        best = u[:, :rank] * s[:rank] @ v[:rank]
        np.testing.assert_allclose(product, best, atol=1e-5 * s[0])


def test_sizes_that_do_not_nest_are_refused(run, tmp_path):
    """And those that come twice; nothing is written."""
    with pytest.raises(UserError, match="^selector: knapsack: family: must have budg"):
        checkpoints.truncate_checkpoint(
            run, tmp_path / "cut", KNAPSACK, sizes=[0.5, 0.5]
        )
    with pytest.raises(
        UserError, match="args: must be an argument of rank, .*got 'fraction'"
    ):
        checkpoints.truncate_checkpoint(
            run, tmp_path / "cut", {"name": "rank", "args": {}}, sizes=[0.5]
        )
    assert not (tmp_path / "cut").exists()


def test_flags_for_sizes_ranks_and_nothing(run, tmp_path):
    """`--dry_run` writes no checkpoint, `--ranks_file` what `--ranks` reads."""
    first = ("train.truncate", f"--checkpoint={run}", "--select=knapsack")
    files = tmp_path / "ranks.json"
    ended = commands.run(
        {
            "dry": (*first, "--params=0.5", "--dry_run", f"--ranks_file={files}"),
            "file": (
                *first[:2],
                f"--ranks={files}",
                f"--output={tmp_path / 'file'}",
            ),
            "family": (
                *first,
                "--family=0.5,0.25",
                "--multiple_of=4",
                f"--output={tmp_path / 'family'}",
                f"--plot={tmp_path / 'family.png'}",
            ),
        }
    )
    dry, file, family = (ended[name].result for name in ("dry", "file", "family"))
    assert dry["output"] is None and dry["ranks"] == file["ranks"]
    assert selecting.read_rank_file(files, "") == dry["ranks"]
    assert [row["fraction"] for row in family["sizes"]] == [0.5, 0.25]
    for row in family["sizes"]:
        ranks = row["ranks"]
        assert ranks["hidden/0"] % 4 == 0 and ranks["head"] in (4, 8, 10)
        assert macs(ranks) <= row["fraction"] * DENSE_MACS
    assert {path.name for path in tmp_path.iterdir()} == {
        "ranks.json",
        "file",
        "family",
        "family.png",
    }
    about = checkpoint.open_checkpoint(tmp_path / "family" / "0.25").metadata
    assert about["truncated"]["selector"]["args"] == {
        "measure": "macs",
        "fraction": 0.25,
        "curve": "energy",
        "multiple_of": 4,
    }
    assert json.loads(json.dumps(about["family"])) == []


def test_a_picture_of_a_search(run, tmp_path):
    """Has a panel of what was scored beside that of the ranks."""
    for name in ("greedy", "minimax"):
        args = {"measure": "macs", "fraction": 0.5}
        args |= {"steps": 4} if name == "greedy" else {}
        plot = tmp_path / f"{name}.svg"
        checkpoints.truncate_checkpoint(
            run, None, {"name": name, "args": args}, plot=plot
        )
    panels = [
        (tmp_path / f"{name}.svg").read_text().count('id="axes_')
        for name in ("greedy", "minimax")
    ]
    assert panels == [2, 1]


def test_the_least_budget_that_keeps_the_figure(run, tmp_path):
    """Judged on held-out examples: it loses no more, and one grid step below does, or
    has no ranks."""
    drop, family = 0.3, {"name": "family", "args": {"measure": "macs"}}
    found = _least(run, tmp_path / "cut", family, drop)
    opened = opening.open_model(run)
    whole = opened.figures("validation")["accuracy"]
    cut = opening.open_model(tmp_path / "cut").figures("validation")["accuracy"]
    assert (found["before"], found["after"]) == (whole, cut)
    assert whole - cut <= drop and found["fraction"] < 0.9
    fraction = found["fraction"] - 1 / drops.GRID
    family["args"]["fraction"] = fraction
    smaller = checkpoints.truncate_checkpoint(run, tmp_path / "below", family)
    lost = opening.open_model(smaller["output"]).figures("validation")["accuracy"]
    assert whole - lost > drop


def test_a_drop_needs_a_rule_with_a_budget(run, tmp_path):
    with pytest.raises(UserError, match="one of 'value', got 'fraction'"):
        _least(run, tmp_path / "cut", {"name": "macs_fraction", "args": {}}, 1.0)


@pytest.mark.parametrize("drop", [0.0, -1.0, float("inf"), float("nan")])
def test_a_drop_that_is_none_is_refused(run, tmp_path, drop):
    with pytest.raises(UserError, match="^--max_drop: must be positive, got"):
        _least(run, tmp_path / "cut", KNAPSACK, drop)
    assert not (tmp_path / "cut").exists()


def _least(path: Path, output: Path, selector: Any, drop: float) -> dict[str, Any]:
    return checkpoints.truncate_checkpoint(path, output, selector, max_drop=drop)


@pytest.mark.parametrize("name", ["safetensors", "stablehlo"])
def test_files_of_other_programs_are_the_cut_model(run, tmp_path, name):
    """A family of them: each is the checkpoint of its size."""
    sizes = [0.5, 0.25]
    for folder, chosen in (("file", name), ("checkpoint", "orbax")):
        checkpoints.truncate_checkpoint(
            run, tmp_path / folder, KNAPSACK, sizes=sizes, format=chosen
        )
    inputs = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    for size in sizes:
        model = load(tmp_path / "checkpoint" / f"{size:g}")
        (path,) = (tmp_path / "file" / f"{size:g}").iterdir()
        assert path.name == f"model.{name}"
        if name == "safetensors":
            other = export.load_safetensors(path, model)
            about = export.read_safetensors(path).metadata
            assert about["truncated"]["selector"]["args"]["fraction"] == size
        else:
            other = export.from_stablehlo(path.read_bytes())
        assert relative_error(other(inputs), model(inputs)) <= 1e-6


def test_a_form_without_lower_ranks_is_refused_before_anything_is_written(
    run, tmp_path
):
    """By a dry run too."""
    rank = {"name": "rank", "args": {"value": 8}}
    checkpoints.truncate_checkpoint(
        run, tmp_path / "gauge", rank, timing=Timing("gauge")
    )
    rank["args"]["value"] = 4
    for output in (None, tmp_path / "cut"):
        with pytest.raises(UserError, match="rank must be 8, the only one of its form"):
            checkpoints.truncate_checkpoint(tmp_path / "gauge", output, rank)
    assert not (tmp_path / "cut").exists()


def test_a_family_is_whole_or_not_there(run, tmp_path, monkeypatch):
    """What stops the second size takes the first along; a kill's leavings are no
    hindrance."""
    save, calls = exporting.save, []

    def second_fails(output, *args, **options):
        calls.append(output)
        if len(calls) == 2:
            raise OSError("the disk is full")
        save(output, *args, **options)

    monkeypatch.setattr(exporting, "save", second_fails)
    given = (run, tmp_path / "cut", KNAPSACK)
    with pytest.raises(OSError, match="the disk is full"):
        checkpoints.truncate_checkpoint(*given, sizes=[0.5, 0.25])
    assert len(calls) == 2 and not (tmp_path / "cut").exists()
    (tmp_path / ".cut.partial").mkdir()
    rank = {"name": "rank", "args": {"value": 8}}
    checkpoints.truncate_checkpoint(run, tmp_path / "cut", rank, format="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_folder_is_whole_or_not_there(run, tmp_path, monkeypatch):
    """A file that is not what was written leaves nothing."""
    monkeypatch.setattr(export, "load_safetensors", lambda path, model: load(run))
    with pytest.raises((OSError, ValueError)):
        checkpoints.truncate_checkpoint(
            run,
            tmp_path / "cut",
            {"name": "rank", "args": {"value": 3}},
            format="safetensors",
        )
    assert not list(tmp_path.iterdir())
