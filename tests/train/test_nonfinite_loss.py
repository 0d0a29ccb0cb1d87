"""A loss that is not finite ends a run, and nothing of it is saved."""

import jax.numpy as jnp
import numpy as np
import pytest
from loop_configs import make_config, phase
from support import stop_after, stored_arrays

from configs import common
from lowrank_jax import checkpoint, penalties
from train import loop

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
