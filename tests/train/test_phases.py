"""Phases that change the model: actions at their end, conditions, frozen factors.

The real loop on digits, in epochs of 4 steps, with models of a few hundred numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx
from phase_configs import DENSE_TO_LOW, STEPS_PER_EPOCH, load, make_config, phase
from reference import relative_error
from support import (
    assert_same_checkpoints,
    at_step,
    fresh_model,
    interrupt,
    stored_arrays,
    sweep,
    train,
)

from configs import common
from lowrank_jax import checkpoint, counting, factorization, surgery
from lowrank_jax.active import get_ranks
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import at_fraction
from lowrank_jax.selection import curves
from train import loop, phases
from train.config import to_json
from train.run import open_run

named = common.named
STILL = named("stable_ranks_stand_still", every_steps=2, points=3, tolerance=100.0)
RESTLESS = named("stable_ranks_stand_still", every_steps=2, points=3, tolerance=0.0)
SVD = {"with_s": True}


def cost_of(model: nnx.Module) -> counting.ModelCost:
    """What a model of the digits costs."""
    return open_run(to_json(make_config(phase()))).cost(model)


def logits(model: nnx.Module) -> jax.Array:
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    model.eval()
    return model(jnp.asarray(images))


# Whole methods in miniature. Each ends low-rank.

ENERGY = named("truncate", selector=named("energy", value=0.7))
FAMILY = named("select_family", fractions=(0.25, 0.5))
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "svd_training": lambda: make_config(
        phase(name="full", penalties=(named("orthogonality", weight=1.0),)),
        phase(
            name="sparse",
            optimizer_state="kept",
            penalties=(named("hoyer", weight=0.1),),
            on_end=(named("canonicalize"), ENERGY),
        ),
        phase(name="tune", on_end=(named("canonicalize"),)),
        rule=SVD,
    ),
    "bsr": lambda: make_config(
        phase(
            name="dense",
            on_end=(
                DENSE_TO_LOW,
                named(
                    "select",
                    selector=named(
                        "beam", measure="params", fraction=0.5, width=2, steps=3
                    ),
                ),
            ),
        ),
        phase(
            name="aim",
            penalties=(
                named(
                    "modified_stable_rank",
                    weight=0.1,
                    target_ranks="selected",
                    every_steps=2,
                ),
            ),
            optimizer_state="kept",
            on_end=(
                named("canonicalize"),
                named("truncate", selector=named("selected")),
            ),
        ),
        phase(name="tune"),
    ),
    "cuttlefish": lambda: make_config(
        phase(
            name="dense",
            until={"epochs": 5, "condition": STILL},
            on_end=(named("factorize_at_stable_rank", rules=((".*", "full"),)),),
        ),
        phase(name="low", until={"to_epoch": 6}, optimizer_state="kept"),
    ),
    "lorita": lambda: make_config(
        phase(8, on_end=(named("canonicalize"),)), rule={"depth": 3}
    ),
    "freezing": lambda: make_config(
        phase(12, trainable=(r"(?!.*/u$).*", r"(?!.*/v$).*")), rule="full"
    ),
    "family": lambda: make_config(
        phase(name="dense", on_end=(DENSE_TO_LOW, FAMILY)),
        phase(
            name="nested",
            sampler=named("matryoshka", fractions=(1.0, 0.5, 0.25), family="selected"),
            sizes="static",
            teacher=named("full", target_weight=0.0),
        ),
    ),
    "normalized": lambda: make_config(
        phase(
            4,
            projections=(named("stable_rank_normalization", stable_rank=2.0),),
        ),
        rule="full",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], Path]:
    """Trains each method once, when it is first asked for."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "run"
            train(METHODS[name](), done[name])
        return done[name]

    return run


class TestEveryMethod:
    @pytest.mark.parametrize("name", METHODS)
    def test_it_truncates_saves_loads_and_evaluates(self, runs, tmp_path, name):
        workdir = runs(name)
        output = tmp_path / "cut"
        cut = support.truncate(workdir, output, "rank", 3)
        assert set(cut["ranks"].values()) <= {1, 2, 3}
        whole = load(checkpoint.open_checkpoint(workdir))
        if not get_ranks(whole):  # a dense one is factorized first
            whole = factorization.factorize(whole)
        small = load(checkpoint.open_checkpoint(output))
        expected = surgery.truncate(whole, cut["ranks"])
        np.testing.assert_array_equal(logits(small), logits(expected))
        figures = support.evaluate(output)
        assert 0 <= figures["accuracy"] <= 1 and figures["ranks"] == cut["ranks"]

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("stop", [3, 6])
    def test_resuming_equals_not_stopping(self, runs, tmp_path, name, stop):
        """Through every change of the model, in every bit; what is remembered too."""
        whole = checkpoint.open_checkpoint(runs(name))
        if stop >= whole.step:
            pytest.skip(f"the run has only {whole.step} steps")
        interrupt(METHODS[name](), tmp_path / "run", stop)
        assert_same_checkpoints(train(METHODS[name](), tmp_path / "run"), whole)


class TestActions:
    def test_canonicalize_orders_the_spectrum(self, runs):
        """With `s` the scales fall and the factors are orthonormal."""
        model = load(checkpoint.open_checkpoint(runs("svd_training")))
        for factors in find_factors(model).values():
            u, s, v = factors.arrays()
            assert np.all(np.diff(s) <= 0) and np.all(np.asarray(s) >= 0)
            np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-5)
            np.testing.assert_allclose(v @ v.T, np.eye(len(s)), atol=1e-5)

    def test_the_energy_rule_cuts_between_phases(self, runs):
        """Each layer keeps the least prefix with the share, of what it was."""
        workdir = runs("svd_training")
        before, after = (at_step(workdir, step) for step in (4, 8))
        assert all(after.metadata["ranks"][p] < r for p, r in before.max_ranks.items())
        assert after.metadata["ranks"] == after.max_ranks

    def test_the_beam_meets_its_budget_and_the_truncation_it(self, runs):
        saved = checkpoint.open_checkpoint(runs("bsr"))
        targets = saved.metadata["run"]["selected"]["target_ranks"]
        assert saved.metadata["ranks"] == targets
        layers = cost_of(load(saved)).layers
        params = sum(layers[p].params(r) for p, r in targets.items())
        assert params <= 0.5 * sum(layer.dense_params for layer in layers.values())

    def test_a_size_is_the_familys_wherever_it_is_asked_for(self, runs, tmp_path):
        """In the sampler, in evaluation and when it is cut; not what a fraction of
        every rank is, and of no more MACs."""
        workdir = runs("family")
        saved = checkpoint.open_checkpoint(workdir)
        (half, ranks), (quarter, _) = saved.metadata["run"]["selected"]["family"]
        assert (half, quarter) == (0.5, 0.25)
        judged = sweep(workdir, (1.0, 0.5, 0.25))
        tables = stored_arrays(saved)
        for path, full in saved.metadata["ranks"].items():
            levels = [row["ranks"][path] for row in judged]
            assert tables[f"sampler/tables/{path}"].tolist() == levels
            assert levels[0] == full
        assert judged[1]["ranks"] == ranks
        uniform = at_fraction(saved.metadata["ranks"], 0.5)
        assert ranks != uniform and judged[1]["macs"] <= cost_of(load(saved)).macs(
            uniform
        )
        cut = support.truncate(workdir, tmp_path / "half", "rank_fraction", 0.5)
        assert cut["ranks"] == ranks
        small = checkpoint.open_checkpoint(tmp_path / "half")
        assert "run" not in small.metadata  # what is cut has sizes of its own

    def test_a_deep_product_is_multiplied_back(self, runs):
        built = fresh_model(METHODS["lorita"]())
        assert {f.depth for f in find_factors(built).values()} == {3}
        model = load(checkpoint.open_checkpoint(runs("lorita")))
        assert {f.depth for f in find_factors(model).values()} == {2}

    def test_merge_makes_it_dense(self, tmp_path):
        config = make_config(phase(2, on_end=(named("merge"),)), rule={"max_rank": 4})
        saved = train(config, tmp_path / "run")
        assert saved.metadata["ranks"] == {}
        matrices = factorization.kernel_matrices(load(saved))
        spectra = [np.linalg.svd(m, compute_uv=False) for m in matrices.values()]
        assert all(s[4] < 1e-5 * s[0] < s[3] for s in spectra)

    def test_recalibration_changes_statistics_alone(self, tmp_path):
        def run(name: str, on_end: Any) -> dict[str, np.ndarray]:
            config = make_config(
                phase(2, on_end=on_end),
                rule="full",
                model=named("convnet", widths=(4, 4)),
            )
            stored = stored_arrays(train(config, tmp_path / name))
            return {k: x for k, x in stored.items() if not k.startswith("opt_state")}

        plain = run("plain", ())
        again = run("again", (named("recalibrate", batches=2),))
        changed = {k for k in plain if not np.array_equal(plain[k], again[k])}
        assert changed == {k for k in plain if k.endswith(("/mean", "/var"))} != set()


class TestConditions:
    def test_a_phase_ends_when_it_is_met(self, runs):
        """Three measurements at steps 0, 2 and 4; `to_epoch` counts from the start."""
        saved = checkpoint.open_checkpoint(runs("cuttlefish"))
        assert saved.metadata["run"]["phase_start"] == 4
        assert saved.step == 6 * STEPS_PER_EPOCH

    def test_it_lasts_to_the_limit_where_it_is_not(self, tmp_path):
        config = make_config(
            phase(8, name="dense", until={"steps": 8, "condition": RESTLESS}),
            phase(2, name="after"),
        )
        saved = train(config, tmp_path / "run")
        assert saved.metadata["run"]["phase_start"] == 8

    def test_a_run_that_ended_early_is_finished(self, tmp_path):
        """Running it once more does not go on to the limit."""
        config = make_config(phase(until={"epochs": 5, "condition": STILL}))
        assert train(config, tmp_path / "run").step == 4
        assert loop.train_and_evaluate(config, tmp_path / "run")["step"] == 4

    def test_ranks_are_the_scaled_stable_ranks(self, runs):
        """From the kernels as they were, by NumPy in float64."""
        workdir = runs("cuttlefish")
        saved = checkpoint.open_checkpoint(workdir)
        config = METHODS["cuttlefish"]()
        fresh = fresh_model(config)

        def stable_ranks(model: nnx.Module) -> dict[str, float]:
            kernels = factorization.kernel_matrices(model)
            spectra = {
                path: np.linalg.svd(np.asarray(m, np.float64), compute_uv=False)
                for path, m in kernels.items()
            }
            return {p: (s**2).sum() / s[0] ** 2 for p, s in spectra.items()}

        first = stable_ranks(fresh)
        remembered = saved.metadata["run"]["initial_stable_ranks"]
        assert remembered == pytest.approx(first, rel=1e-5)
        # at step 4 the phase ends: the factors there are the SVD of the kernels
        low = load(at_step(workdir, 4))
        config["phases"] = config["phases"][:1]
        config["phases"][0]["on_end"] = []
        dense = load(train(config, workdir.parent / "dense"))
        now = stable_ranks(dense)
        full = {"hidden/0": 16, "head": 10}
        wanted = {p: int(np.ceil(now[p] * full[p] / first[p] - 1e-3)) for p in full}
        wanted = {p: min(r, full[p]) for p, r in wanted.items()}
        ranks = get_ranks(low)
        assert cost_of(dense).layers == {}
        for path, rank in wanted.items():
            i, o = factorization.kernel_matrices(dense)[path].shape
            assert ranks.get(path) == (rank if rank * (i + o) < i * o else None)


class TestTrainable:
    def test_one_factor_rests_in_each_epoch(self, runs):
        """u in the first and third epoch, v in the second; biases never."""
        workdir = runs("freezing")
        fresh = fresh_model(METHODS["freezing"]())
        first = {
            f"params/{k}": np.asarray(x)
            for k, x in checkpoint.flatten(
                checkpoint.model_items(fresh)["params"]
            ).items()
        }
        points = [
            first,
            *(stored_arrays(at_step(workdir, step)) for step in (4, 8, 12)),
        ]
        for epoch in range(3):
            for key in first:
                same = np.array_equal(points[epoch][key], points[epoch + 1][key])
                rests = key.endswith("u" if epoch % 2 == 0 else "v")
                assert same == (rests and "factors" in key), (epoch, key)

    def test_decay_spares_what_rests(self, tmp_path):
        decay = common.optimizer("adamw", learning_rate=0.1, weight_decay=0.5)
        config = make_config(
            phase(2, optimizer=decay, trainable=(".*bias",)), rule="full"
        )
        fresh = fresh_model(config)
        model = load(train(config, tmp_path / "run"))
        for path, factors in find_factors(model).items():
            before = find_factors(fresh)[path]
            np.testing.assert_array_equal(factors.u[...], before.u[...])


class TestProjections:
    def test_the_stable_rank_stays_below(self, runs, tmp_path):
        model = load(checkpoint.open_checkpoint(runs("normalized")))
        ranks = curves.stable_ranks(factorization.kernel_matrices(model))
        assert all(rank <= 2.0 + 1e-4 for rank in ranks.values())
        free = make_config(phase(4), rule="full")  # the control
        ranks = curves.stable_ranks(
            factorization.kernel_matrices(load(train(free, tmp_path / "run")))
        )
        assert all(rank > 2.5 for rank in ranks.values())


def test_penalties_count_steps_from_the_phase(tmp_path, monkeypatch):
    """The first step of every phase is 0."""
    seen: list[int] = []

    def note(*, tag: str) -> Any:
        def penalty(model, step=0):
            jax.debug.callback(lambda n: seen.append(int(n)), step, ordered=True)
            return jnp.float32(0)

        return penalty

    monkeypatch.setitem(phases.PENALTIES, "note", note)
    penalties = (named("note", tag="x"),)
    config = make_config(
        phase(2, name="a", penalties=penalties),
        phase(3, name="b", penalties=penalties),
        rule="full",
    )
    train(config, tmp_path / "run")
    jax.effects_barrier()
    assert [n for n in seen if n >= 0][-5:] == [0, 1, 0, 1, 2]


def test_random_factors_are_the_seeds(tmp_path):
    """`init: random` is drawn from the config's seed, and unlike the spectral one."""
    config = make_config(phase(1), rule={"init": "random", "max_rank": 4})
    first, again = (find_factors(fresh_model(config))["head"].u[...] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    config["rank_rules"][0][1]["init"] = "svd"
    spectral = find_factors(fresh_model(config))["head"].u[...]
    assert relative_error(spectral, first) > 0.1


class TestRecalibratedLevels:
    def test_every_size_has_statistics_of_its_own(self, tmp_path):
        """With them a cut model's loss falls; the full one's hardly moves."""
        config = make_config(
            phase(
                24,
                sampler=named("uniform_fraction", fractions=(0.5, 1.0)),
                teacher=named("full", target_weight=0.0),
            ),
            rule="full",
            model=named("convnet", widths=(8, 8)),
            recalibration_batches=4,
        )
        rows = loop.train_and_evaluate(config, tmp_path / "run")["frontier"]
        plain, own = (
            sweep(
                tmp_path / "run",
                (1.0, 0.5),
                "validation",
                recalibration_batches=count,
            )
            for count in (0, 4)
        )
        assert own[1]["loss"] < plain[1]["loss"]
        assert [r["loss"] for r in own] == pytest.approx([r["loss"] for r in rows])
