"""Evaluation: figures by NumPy, of a moved checkpoint, at fractions of the ranks."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from cutting import FIGURES, cut_to, load
from messages import check_form

from configs import common
from train import evaluate as evaluate_binary
from train import opening, stopping
from train.data import pipeline


class TestEvaluate:
    def test_figures_by_numpy(self, run):
        """Accuracy and loss on all 360 test images, from the logits."""
        config = common.data("digits", batch_size=1, validation_examples=137)
        data = pipeline.load_data(config, allow_imports=[])
        batch = next(data.eval_batches("test", 360))
        logits = np.asarray(
            load(run)((jnp.asarray(batch["image"], jnp.float32) - 4.88) / 6.02),
            np.float64,
        )
        chosen = logits[np.arange(360), batch["label"]]
        losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
        row = opening.open_model(run).figures()
        assert set(row) == FIGURES
        assert row["accuracy"] == (logits.argmax(axis=-1) == batch["label"]).mean()
        assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)

    def test_a_moved_checkpoint_stands_alone(self, run, tmp_path):
        """Neither the run nor the first checkpoint is needed; nor its name."""
        cut_to(run, tmp_path / "cut", "rank", 8)
        before = opening.open_model(tmp_path / "cut").figures()
        (tmp_path / "far").mkdir()
        shutil.move(tmp_path / "cut", tmp_path / "far" / "moved")
        assert opening.open_model(tmp_path / "far/moved").figures() == before
        (step,) = (p for p in (run / "checkpoints").iterdir() if p.name.isdigit())
        shutil.copytree(step, tmp_path / "alone")
        expected = opening.open_model(run).figures()
        assert opening.open_model(tmp_path / "alone").figures() == expected

    def test_fractions_are_those_of_truncated_checkpoints(self, run, tmp_path):
        rows = opening.open_model(run).sweep([1.0, 0.25])
        assert [row["rank_fraction"] for row in rows] == [1.0, 0.25]
        assert all(set(row) == FIGURES | {"rank_fraction"} for row in rows)
        cut_to(run, tmp_path / "cut", "rank_fraction", 0.25)
        cut = opening.open_model(tmp_path / "cut").figures()
        assert {k: rows[1][k] for k in ("accuracy", "params", "macs", "ranks")} == {
            k: cut[k] for k in ("accuracy", "params", "macs", "ranks")
        }
        assert rows[1]["loss"] == pytest.approx(cut["loss"], rel=1e-5)

    def test_a_loss_that_is_not_finite_ends_it(self, run):
        """By one line, with the ranks; a picture of NaN is none."""
        opened = opening.open_model(run)
        bias = opened.model.head.bias
        bias.set_value(bias.get_value().at[0].set(jnp.nan))
        for judge in (opened.figures, lambda: opened.sweep([0.25])):
            with pytest.raises(stopping.NotFinite) as ended:
                judge()
            check_form(str(ended.value))
            assert "loss on the test split: must be finite, got nan at ranks" in str(
                ended.value
            )

    @pytest.mark.parametrize("values", [["1", "half"], ["0"], ["1.5"], ["nan"], [""]])
    def test_bad_fractions(self, values):
        with pytest.raises(ValueError, match="--rank_fractions: must be numbers in"):
            evaluate_binary.parse_fractions(values)
