"""What the end of a phase carries over of the optimizer's state."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from phase_configs import DENSE_TO_LOW, SGD, make_config, phase
from reference import relative_error
from support import at_step, stored_arrays, train

from configs import common
from lowrank_jax import factorization, surgery
from train import ending
from train.actions import Kind

ADAM = common.optimizer("adam", learning_rate=1e-2)


class TestOptimizerState:
    """Dense -> low-rank in the middle of a run."""

    def factorized(self, tmp_path: Path, optimizer: Any, kept: str) -> tuple[Any, Any]:
        config = make_config(
            phase(4, name="dense", optimizer=optimizer, on_end=(DENSE_TO_LOW,)),
            phase(4, name="low", optimizer=optimizer, optimizer_state=kept),
        )
        train(config, tmp_path / "run")
        dense = make_config(phase(4, optimizer=optimizer))
        dense["phases"][0]["name"] = "dense"
        return (
            stored_arrays(train(dense, tmp_path / "dense")),
            stored_arrays(at_step(tmp_path / "run", 4)),
        )

    def test_momentum_goes_over_by_the_chain_rule(self, tmp_path):
        dense, low = self.factorized(tmp_path, SGD, "kept")
        (trace,) = {k.removesuffix("head/kernel") for k in dense if "trace/head/k" in k}
        for layer in ("head", "hidden/0"):
            u, v = (low[f"params/{layer}/factors/{n}"] for n in "uv")
            momentum = dense[f"{trace}{layer}/kernel"]
            for name, wanted in (("u", momentum @ v.T), ("v", u.T @ momentum)):
                error = relative_error(low[f"{trace}{layer}/factors/{name}"], wanted)
                assert error < 1e-5
            bias = f"{trace}{layer}/bias"
            np.testing.assert_array_equal(low[bias], dense[bias])

    def test_a_new_state_is_zero(self, tmp_path):
        _, low = self.factorized(tmp_path, SGD, "new")
        traces = [x for k, x in low.items() if "trace" in k]
        assert traces and not any(x.any() for x in traces)

    def test_adam_says_why_it_starts_anew(self, tmp_path, capfd):
        _, low = self.factorized(tmp_path, ADAM, "kept")
        said = capfd.readouterr().err
        assert "factorize: the optimizer's ScaleByAdamState starts anew, as" in said
        assert not any(x.any() for k, x in low.items() if k.endswith("/mu"))

    def test_kept_moments_with_a_schedule_of_its_own(self, tmp_path):
        """Two phases with `kept` do what one does, if the learning rate is constant."""
        two = make_config(
            phase(4, name="a"), phase(4, name="b", optimizer_state="kept"), rule="full"
        )
        new = make_config(phase(4, name="a"), phase(4, name="b"), rule="full")
        one = make_config(phase(8), rule="full")
        results = [
            stored_arrays(train(c, tmp_path / n))
            for n, c in (("two", two), ("one", one), ("new", new))
        ]
        key = "params/head/factors/u"
        np.testing.assert_array_equal(results[0][key], results[1][key])
        assert not np.array_equal(results[2][key], results[1][key])

    def test_a_cut_and_a_rotation(self):
        """A prefix keeps its moments, a rotation starts anew."""
        model = factorization.factorize(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        optimizer = optax.sgd(0.1, momentum=0.9)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        opt_state = optimizer.update(params, optimizer.init(params), params)[1]
        small = surgery.truncate(model, {"": 2})
        cut, restarted = ending.carry_opt_state(
            Kind.CUT, model, small, opt_state, optimizer
        )
        assert restarted == []
        trace = cut[0].trace["factors"]["u"]
        np.testing.assert_array_equal(trace, params["factors"]["u"][:, :2])
        fresh, restarted = ending.carry_opt_state(
            Kind.ROTATED, model, surgery.canonicalize(model), opt_state, optimizer
        )
        assert restarted and not any(x.any() for x in jax.tree.leaves(fresh))
