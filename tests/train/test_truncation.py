"""Truncation: what each selector keeps, what is written, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cutting import FULL, cut_to, load, make_config
from flax import nnx
from messages import check_form
from reference import relative_error

from configs import common
from lowrank_jax import checkpoint
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from lowrank_jax.surgery import merge
from train import loop, opening
from train.data import pipeline
from train.timing import Timing

CUT = {"head": 3, "hidden/0": 16}


@pytest.fixture(scope="module")
def norm_run(tmp_path_factory) -> Path:
    """A convolutional network with BatchNorm."""
    workdir = tmp_path_factory.mktemp("convnet") / "run"
    config = make_config("convnet", {"widths": (4, 8)}, epochs=1)
    loop.train_and_evaluate(config, workdir)
    return workdir


def images(count: int = 32) -> jnp.ndarray:
    config = common.data("digits", batch_size=count, validation_examples=137)
    data = pipeline.load_data(config, allow_imports=[])
    batch = next(data.eval_batches("test", count))
    return (jnp.asarray(batch["image"], jnp.float32) - 4.88) / 6.02


def size_on_disk(path: Path) -> int:
    params = checkpoint.open_checkpoint(path).path / "params"
    return sum(p.stat().st_size for p in params.rglob("*") if p.is_file())


def masked(path: Path, ranks: dict[str, int]) -> nnx.Module:
    model = load(path)
    set_ranks(model, ranks)
    return model


class TestTruncate:
    def test_rank(self, run, tmp_path):
        """Every layer at most at it."""
        result = cut_to(run, tmp_path / "cut", "rank", 16)
        assert result["ranks"] == {"head": 10, "hidden/0": 16}
        assert set(result) == {"output", "params", "stored", "macs", "ranks"}

    def test_rank_of_zero(self, run, tmp_path):
        """What is left is the biases: one answer for all images."""
        cut_to(run, tmp_path / "cut", "rank", 0)
        logits = np.asarray(load(tmp_path / "cut")(images()))
        assert np.ptp(logits, axis=0).max() == 0
        row = opening.open_model(tmp_path / "cut").figures()
        assert row["ranks"] == {"head": 0, "hidden/0": 0}

    def test_rank_fraction(self, run, tmp_path):
        """Of each layer's rank, rounded up."""
        output = tmp_path / "cut"
        result = cut_to(run, output, "rank_fraction", 0.23)
        assert result["ranks"] == {"head": 3, "hidden/0": 15}

    def test_ranks(self, run, tmp_path):
        """By file; a layer that is not named keeps its rank."""
        (tmp_path / "ranks.json").write_text('{"hidden/0": 5}')
        output = tmp_path / "cut"
        result = cut_to(run, output, "ranks", str(tmp_path / "ranks.json"))
        assert result["ranks"] == {"head": 10, "hidden/0": 5}

    def test_energy(self, run, tmp_path):
        """The least prefix with the share of the squared importances, by NumPy."""
        result = cut_to(run, tmp_path / "cut", "energy", 0.8)
        for path, factors in find_factors(load(run)).items():
            u, v = (np.asarray(x[...], np.float64) for x in (factors.u, factors.v))
            importance = np.linalg.norm(u, axis=0) * np.linalg.norm(v, axis=1)
            share = np.cumsum(importance**2) / np.sum(importance**2)
            rank = result["ranks"][path]
            assert share[rank - 1] >= 0.8 > share[rank - 2]

    @pytest.mark.parametrize("budget", [0.5, 0.25])
    def test_params_fraction(self, run, tmp_path, budget):
        """The largest common fraction within the budget of the factored layers."""
        output = tmp_path / "cut"
        result = cut_to(run, output, "params_fraction", budget)
        kept = sum(
            r * s
            for r, s in zip(
                (result["ranks"][p] for p in ("head", "hidden/0")),
                (90, 144),
                strict=True,
            )
        )
        dense = 80 * 10 + 64 * 80
        assert kept <= budget * dense
        assert kept + 90 + 144 > budget * dense
        stored = sum(np.size(x) for x in _params(output))
        assert stored == kept + 80 + 10
        assert result["params"] == stored

    @pytest.mark.parametrize(
        "ranks", [{"head": 3, "hidden/0": 7}, {"head": 10, "hidden/0": 1}]
    )
    def test_the_output_is_that_of_the_masked_model(self, run, tmp_path, ranks):
        (tmp_path / "ranks.json").write_text(json.dumps(ranks))
        output = tmp_path / "cut"
        cut_to(run, output, "ranks", tmp_path / "ranks.json")
        small, inputs = load(output), images()
        assert max_ranks(small) == ranks
        assert relative_error(small(inputs), masked(run, ranks)(inputs)) < 1e-6

    def test_files_shrink_with_the_ranks(self, run, tmp_path):
        sizes = [size_on_disk(run)]
        for rank in (32, 8, 1):
            output = tmp_path / str(rank)
            cut_to(run, output, "rank", rank)
            sizes.append(size_on_disk(output))
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
        assert sizes[1] < 0.75 * sizes[0]

    def test_twice_is_once(self, run, tmp_path):
        """A truncated checkpoint can be cut again, to the same bits."""
        for source, name, rank in (
            (run, "a", 8),
            (tmp_path / "a", "b", 3),
            (run, "c", 3),
        ):
            cut_to(source, tmp_path / name, "rank", rank)
        twice, once = (load(tmp_path / name)(images()) for name in "bc")
        np.testing.assert_array_equal(twice, once)

    def test_the_table(self, run, tmp_path, capsys):
        """Of the layers that are left, as `lowrank_jax.summary` prints it; a dry run
        prints the same, and what is merged is told."""
        result = cut_to(run, tmp_path / "cut", "rank", 2)
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        headers = "path type form rank stored cheapest dense MACs dense MACs"
        assert lines[0].split() == headers.split()
        head = "head LowRankLinear factored 10 -> 2 190 190 810 180 800"
        assert lines[1].split() == head.split()
        assert lines[2].split()[:6] == "hidden/0 LowRankLinear factored 64 -> 2".split()
        total = [f"{result[key]:,}" for key in ("stored", "params")]
        assert lines[4].split()[:3] == ["total", *total]
        cut_to(run, None, "rank", 2)
        assert capsys.readouterr().out == printed
        merged = Timing(form="merged")
        cut_to(run, tmp_path / "merged", "rank", 2, timing=merged)
        assert "64 -> merged" in capsys.readouterr().out

    def test_recalibration_changes_the_statistics_alone(
        self, norm_run, tmp_path, capsys
    ):
        """The convolutions' statistics become those of the cut model's activations; a
        cut that leaves them says so."""
        for name, batches in (("plain", 0), ("new", 4)):
            cut_to(
                norm_run,
                tmp_path / name,
                "rank",
                2,
                recalibration_batches=batches,
            )
            told = "BatchNorm keeps the statistics" in capsys.readouterr().err
            assert told == (batches == 0)
        plain, new = (
            checkpoint.model_items(load(tmp_path / n)) for n in ("plain", "new")
        )
        for key, array in checkpoint.flatten(plain["params"]).items():
            other = checkpoint.flatten(new["params"])[key]
            np.testing.assert_array_equal(array, other, err_msg=key)
        statistics = checkpoint.flatten(plain["model_state"])
        assert len(statistics) == 4  # mean and variance of two layers
        for key, array in statistics.items():
            other = checkpoint.flatten(new["model_state"])[key]
            assert relative_error(other, array) > 1e-3, key
        losses = [
            opening.open_model(tmp_path / n).figures("train")["loss"]
            for n in ("plain", "new")
        ]
        assert losses[1] < losses[0]


def _params(path: Path) -> list[Any]:
    return list(
        checkpoint.flatten(checkpoint.model_items(load(path))["params"]).values()
    )


class TestTruncateRefuses:
    """Before any work: the error names flag and value, and there is no output."""

    @pytest.mark.parametrize(
        "selector, value, parts",
        [
            ("rank", -1, ("selector: rank: ", "-1")),
            ("rank_fraction", 0.0, ("selector: rank_fraction: ", "(0, 1]", "0.0")),
            ("rank_fraction", 1.5, ("selector: rank_fraction: ", "1.5")),
            ("energy", 0.0, ("selector: energy: ", "(0, 1]", "0.0")),
            ("energy", 1.5, ("selector: energy: ", "1.5")),
            ("params_fraction", 2.0, ("selector: params_fraction: ", "2.0")),
            (
                "params_fraction",
                1e-4,
                ("selector: params_fraction: ", "at least", "0.0001"),
            ),
        ],
    )
    def test_values_out_of_bounds(self, run, tmp_path, selector, value, parts):
        with pytest.raises(ValueError) as caught:
            cut_to(run, tmp_path / "cut", selector, value)
        for part in parts:
            assert part in str(caught.value)
        check_form(str(caught.value))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "text, parts",
        [
            ("{", ("--ranks: ", "ranks.json: must be JSON, got '{'")),
            ("[3]", ("--ranks: ", "must be a JSON object, got [3]")),
            ('{"hiden/0": 3, "tail": 1}', ("['hiden/0', 'tail']", "'hidden/0'")),
            (
                '{"head": 11, "hidden/0": -1}',
                ("head: rank must be in [0, 10], got 11",),
            ),
            ('{"hidden/0": -1}', ("hidden/0: rank must be in [0, 64], got -1",)),
            ('{"head": 2.5}', ("head: rank must be a whole number", "2.5")),
            ('{"head": "3"}', ("head: rank must be a whole number", "'3'")),
        ],
    )
    def test_rank_files(self, run, tmp_path, text, parts):
        (tmp_path / "ranks.json").write_text(text)
        with pytest.raises(ValueError) as caught:
            cut_to(run, tmp_path / "cut", "ranks", str(tmp_path / "ranks.json"))
        for part in parts:
            assert part in str(caught.value)
        check_form(str(caught.value))
        assert not (tmp_path / "cut").exists()

    def test_all_bad_ranks_at_once(self, run, tmp_path):
        (tmp_path / "ranks.json").write_text('{"head": 11, "hidden/0": -1, "tail": 1}')
        with pytest.raises(ValueError) as caught:
            cut_to(run, tmp_path / "cut", "ranks", str(tmp_path / "ranks.json"))
        for part in ("got 11", "got -1", "'tail'"):
            assert part in str(caught.value)

    def test_a_rank_file_that_is_not_there(self, run, tmp_path):
        with pytest.raises(ValueError, match="--ranks: .*nothing.json"):
            cut_to(run, tmp_path / "cut", "ranks", str(tmp_path / "nothing.json"))

    def test_a_rank_above_that_of_a_truncated_one(self, run, tmp_path):
        """Columns that were cut away do not come back."""
        cut_to(run, tmp_path / "a", "rank", 4)
        (tmp_path / "ranks.json").write_text('{"head": 5}')
        with pytest.raises(ValueError, match=r"head: rank must be in \[0, 4\], got 5"):
            cut_to(tmp_path / "a", tmp_path / "b", "ranks", tmp_path / "ranks.json")

    def test_a_half_written_checkpoint(self, run, tmp_path):
        shutil.copytree(run / "checkpoints", tmp_path / "half")
        (step,) = (tmp_path / "half").iterdir()
        (step / "_CHECKPOINT_METADATA").unlink()
        for path in (tmp_path / "half", step):
            with pytest.raises(FileNotFoundError, match="--checkpoint: .*complete"):
                cut_to(path, tmp_path / "cut", "rank", 4)
        assert not (tmp_path / "cut").exists()

    def test_damaged_metadata(self, run, tmp_path):
        shutil.copytree(run / "checkpoints", tmp_path / "bad")
        (file,) = (tmp_path / "bad").glob("*/metadata/metadata")
        file.write_text("{")
        with pytest.raises(ValueError, match="--checkpoint: .*: must be JSON"):
            cut_to(tmp_path / "bad", tmp_path / "cut", "rank", 4)

    @pytest.mark.parametrize("version", [1, 99])
    def test_another_format(self, run, tmp_path, version):
        """An older one as well, by name: it says what to read it with."""
        shutil.copytree(run / "checkpoints", tmp_path / "new")
        (file,) = (tmp_path / "new").glob("*/metadata/metadata")
        metadata = json.loads(file.read_text()) | {"format_version": version}
        del metadata["sha256"]  # which others write otherwise, if at all
        file.write_text(json.dumps(metadata))
        message = f"^--checkpoint: must be of format 3, got {version} .*Use the library"
        with pytest.raises(UserError, match=message):
            opening.open_model(tmp_path / "new")
        with pytest.raises(UserError, match=message):
            cut_to(tmp_path / "new", tmp_path / "cut", "rank", 4)

    def test_a_checkpoint_of_another_program(self, run, tmp_path):
        """One without a config, as someone's own loop writes it, is named as such."""
        model = load(run)
        checkpoint.save(tmp_path / "own", model)
        with pytest.raises(ValueError, match="must hold config, facts and rank_rules"):
            opening.open_model(tmp_path / "own").figures()


@pytest.fixture(scope="module")
def gauge(run, tmp_path_factory) -> Path:
    """The run cut to `CUT` in the gauge-aligned form; the factored one is beside it."""
    folder = tmp_path_factory.mktemp("gauge")
    (folder / "ranks.json").write_text(json.dumps(CUT))
    for form in ("factored", "gauge"):
        cut_to(run, folder / form, "ranks", folder / "ranks.json", timing=Timing(form))
    return folder / "gauge"


class TestGauge:
    """The gauge-aligned form: the same model in fewer numbers, and no smaller one."""

    def test_it_is_evaluated_and_merged(self, gauge):
        """With the figures of the factored form at the same ranks, less r^2 numbers."""
        row = opening.open_model(gauge).figures()
        factored = opening.open_model(gauge.parent / "factored").figures()
        assert row["ranks"] == factored["ranks"] == CUT
        saved = sum(rank**2 for rank in CUT.values())
        assert row["params"] == factored["params"] - saved
        assert row["params"] == sum(np.size(x) for x in _params(gauge))
        assert row["accuracy"] == factored["accuracy"]
        assert row["loss"] == pytest.approx(factored["loss"], rel=1e-4)
        model, inputs = load(gauge), images()
        assert not find_factors(merge(model))
        expected = load(gauge.parent / "factored")(inputs)
        for form in (model, merge(model)):
            assert relative_error(form(inputs), expected) < 1e-5

    def test_its_metadata_say_how_it_was_made(self, gauge):
        about = checkpoint.open_checkpoint(gauge).metadata["truncated"]
        assert set(about["forms"].values()) == {"gauge"} and about["from"] == FULL
        assert about["selector"] == {"name": "ranks", "args": {"value": CUT}}

    def test_its_own_ranks_are_no_cut(self, gauge, tmp_path):
        """A cap above them leaves it as it is."""
        assert cut_to(gauge, tmp_path / "cut", "rank", 16)["ranks"] == CUT
        expected = opening.open_model(gauge).figures()
        assert opening.open_model(tmp_path / "cut").figures() == expected
        (row,) = opening.open_model(gauge).sweep([1.0])
        assert row == {"rank_fraction": 1.0, **expected}

    def test_a_lower_rank_is_refused_by_name(self, gauge, tmp_path):
        """By cutting again, and by a sweep; nothing is written."""
        message = "hidden/0: rank must be 16, the only one of its form, got 8. Cut the"
        with pytest.raises(UserError, match=message):
            cut_to(gauge, tmp_path / "cut", "rank", 8)
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match=message):
            opening.open_model(gauge).sweep([1.0, 0.5])
