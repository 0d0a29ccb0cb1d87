"""A loss that is not finite ends a run, and nothing of it is saved."""

import jax.numpy as jnp
import numpy as np
import pytest
from loop_configs import make_config, phase
from support import metric_lines, stop_after, stored_arrays

from configs import common
from lowrank_jax import checkpoint, penalties
from lowrank_jax.paths import find_factors
from train import loop
from train.report import status
from train.stopping import NotFinite

named = common.named


class TestNonFiniteLoss:
    def test_it_ends_the_run_naming_the_steps(self, tmp_path, monkeypatch):
        """The checkpoint is from before, and running it again goes on from there."""

        def explode(*, at: int) -> penalties.Penalty:
            return lambda model, step=0: jnp.where(step >= at, jnp.nan, 0.0)

        monkeypatch.setitem(penalties.PENALTIES, "explode", explode)
        penalty = named("explode", at=6)
        config = make_config(phase(12, penalties=(penalty,)))
        for _ in range(2):
            with pytest.raises(FloatingPointError, match="step 7 to 8.*learning_rate"):
                loop.train_and_evaluate(config, tmp_path / "run")
            saved = checkpoint.open_checkpoint(tmp_path / "run")
            assert saved.step == 4
            arrays = stored_arrays(saved).values()
            assert all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f")

    def test_a_stop_does_not_save_it(self, tmp_path, monkeypatch):
        def explode() -> penalties.Penalty:
            return lambda model, step=0: jnp.float32(jnp.nan)

        monkeypatch.setitem(penalties.PENALTIES, "explode", explode)
        penalty = named("explode")
        config = make_config(phase(12, penalties=(penalty,)))
        stop_after(monkeypatch, 1)
        with pytest.raises(FloatingPointError, match="at step 1"):
            loop.train_and_evaluate(config, tmp_path / "run")
        assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


class TestNonFiniteGradient:
    def test_it_ends_the_run_naming_step_and_parameter(self, tmp_path, monkeypatch):
        """The loss is finite: the root of zero has no slope there. The names are those
        of the phase that runs, and the checkpoint is from before."""

        def root(*, path: str, at: int) -> penalties.Penalty:
            def penalty(model, step=0):
                factors = find_factors(model)[path]
                return jnp.sum(jnp.sqrt(0 * factors.v + (step < at)))

            return penalty

        monkeypatch.setitem(penalties.PENALTIES, "root", root)
        penalty = named("root", path="head", at=2)
        config = make_config(
            phase(4, name="first"), phase(4, name="second", penalties=(penalty,))
        )
        for _ in range(2):
            with pytest.raises(NotFinite) as caught:
                loop.train_and_evaluate(config, tmp_path / "run")
            assert str(caught.value).startswith(
                "gradient: must be finite, got NaN or infinity at step 7 to 8 (first"
                " gradient that is not finite: head/factors/v)."
            )
            assert str(caught.value).endswith("the last checkpoint is of step 4.")
        report = status.read(tmp_path / "run")
        assert report["state"] == "failed" and "head/factors/v" in report["message"]
        lines = metric_lines(tmp_path / "run")
        assert not any("nonfinite_gradient" in name for line in lines for name in line)
