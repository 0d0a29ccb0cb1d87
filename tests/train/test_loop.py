"""The real training loop on real digits, with models of a few hundred numbers.

260 of the 1,437 digits are trained on in batches of 65, so an epoch has 4 steps.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx
from reference import relative_error
from support import (
    DIGITS,
    assert_same_checkpoints,
    at_step,
    begin,
    compiled_anew,
    fresh_model,
    interrupt,
    metric_lines,
    put,
    stop_after,
    stored_arrays,
)

from configs import common
from lowrank_jax import checkpoint, penalties
from lowrank_jax.active import max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from train import checks, loop, optim, phases
from train.config import to_json
from train.data import pipeline
from train.run import open_run
from train.state import model_state_of, new_state
from train.step import make_train_step

STEPS_PER_EPOCH = 4
BATCH_SIZE = 65
MODELS = {
    "mlp": {"hidden": (16,)},
    "convnet": {"widths": (4, 4)},
    "vit": {
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 2,
        "mlp_dim": 8,
        "dropout_rate": 0.1,
    },
}
SGD = common.optimizer("sgd", learning_rate=0.1, args={"momentum": 0.5})
named = common.named


def phase(until: int, *, name: str = "only", **changes: Any) -> dict[str, Any]:
    """A phase of so many steps; plain training of the factors unless changed."""
    values = {"optimizer": SGD, **changes}
    return common.phase(name=name, until={"steps": until}, **values)


def make_config(*of_phases: dict[str, Any], model: str = "mlp", **changes: Any):
    """A config that is evaluated each epoch."""
    choice = {"name": model, "args": MODELS[model]}
    changes = {"eval_every_epochs": 1, **changes}
    return support.make_config(*of_phases, model=choice, **changes)


# Two phases, both with shrinking in reach: Maestro's, then a nested one.

TRACES: list[tuple[str, tuple[int, ...]]] = []


def count_traces(*, tag: str) -> penalties.Penalty:
    """No penalty at all: notes each trace of the step, with the allocated ranks."""

    def penalty(model, step=0):
        if isinstance(step, jax.core.Tracer):
            layers = find_factors(model).values()
            TRACES.append((tag, tuple(factors.max_rank for factors in layers)))
        return jnp.float32(0)

    return penalty


def traces_of_checks(config: dict[str, Any]) -> int:
    """How many of them come from the check before the first step."""
    run, before = open_run(to_json(config)), len(TRACES)
    plan = phases.build_phases(run.config["phases"])
    checks.check_phases(run, plan, run.fresh_model())
    count = len(TRACES) - before
    del TRACES[before:]
    return count


def counter(tag: str) -> dict[str, Any]:
    return named("count_traces", tag=tag)


def lasso(weight: float) -> dict[str, Any]:
    return named("hierarchical_group_lasso", weight=weight)


def two_phases(weight: float = 0.05) -> Any:
    shrink = {"every_epochs": 1, "threshold": 0.3, "multiple": 1}
    adam = common.optimizer(
        "adamw",
        learning_rate=1e-2,
        schedule=common.cosine(warmup_steps=2),
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return make_config(
        phase(
            8,
            name="maestro",
            sampler=named("single_layer"),
            penalties=(lasso(weight), counter("maestro")),
            shrink=shrink,
        ),
        phase(
            4,
            name="nested",
            sampler=named("sandwich", passes=3),
            teacher=named("full", target_weight=0.5),
            penalties=(counter("nested"),),
            optimizer=adam,
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def counting_penalty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(penalties.PENALTIES, "count_traces", count_traces)
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> dict[str, Any]:
    """The run of two phases that nobody stops."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    TRACES.clear()
    checked = traces_of_checks(two_phases())
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        result = loop.train_and_evaluate(two_phases(), workdir)
    return {
        "workdir": workdir,
        "checkpoints": workdir / "checkpoints",
        "result": result,
        "traces": TRACES[checked:],
        "stderr": said.getvalue(),
    }


STOPS = (3, 4, 5, 8, 9)
"""Before a shrink, at it (an epoch boundary), after it, between the phases, after."""


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """The same run, stopped and started again at each of `STOPS`."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    for step in STOPS:
        interrupt(two_phases(), workdir, step)
    loop.train_and_evaluate(two_phases(), workdir)
    return workdir


class TestResume:
    @pytest.mark.parametrize("step", [4, 8, 12])
    def test_stopping_leaves_no_trace_in_the_state(self, whole_run, stopped_run, step):
        workdirs = stopped_run, whole_run["workdir"]
        assert_same_checkpoints(*(at_step(workdir, step) for workdir in workdirs))

    def test_every_stop_saved_where_it_was(self, stopped_run):
        saved = {int(p.name) for p in (stopped_run / "checkpoints").iterdir()}
        assert saved == {*STOPS, 4, 8, 12}

    def test_metrics_hold_every_step_once(self, whole_run, stopped_run):
        """What is evaluated is the same as well."""

        def validation(workdir: Path) -> list[dict[str, Any]]:
            lines = metric_lines(workdir)
            return [x for x in lines if any("validation" in key for key in x)]

        assert validation(stopped_run) == validation(whole_run["workdir"])

    def test_a_killed_run_goes_on_from_its_last_checkpoint(
        self, whole_run, tmp_path, monkeypatch
    ):
        batches = pipeline.Dataset.train_batches

        def broken(self, *args: Any, **kwargs: Any):
            for number, batch in enumerate(batches(self, *args, **kwargs)):
                if number == 6:
                    raise KeyError("the plug was pulled")
                yield batch

        workdir = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Dataset, "train_batches", broken)
            with pytest.raises(KeyError, match="plug"):
                loop.train_and_evaluate(two_phases(), workdir)
        assert checkpoint.open_checkpoint(workdir).step == 4
        with compiled_anew():  # as by another process
            loop.train_and_evaluate(two_phases(), workdir)
        for step in (8, 12):
            whole = at_step(whole_run["workdir"], step)
            assert_same_checkpoints(at_step(workdir, step), whole)
        steps_logged = [x["step"] for x in metric_lines(workdir) if "train/loss" in x]
        assert steps_logged == sorted(set(steps_logged))

    def test_a_finished_run_stays_as_it_is(self, whole_run):
        """Running it once more evaluates and writes nothing."""
        workdir = whole_run["workdir"]

        def files() -> dict[Path, int]:
            everything = workdir.glob("checkpoints/**/*")
            return {p: p.stat().st_mtime_ns for p in everything if p.is_file()}

        before, lines = files(), metric_lines(workdir)
        result = loop.train_and_evaluate(two_phases(), workdir)
        assert result == whole_run["result"]
        assert (files(), metric_lines(workdir)) == (before, lines)

    @pytest.mark.parametrize(
        "model, sampler",
        [
            ("convnet", named("uniform_fraction")),  # BatchNorm
            ("vit", named("full")),  # dropout
        ],
    )
    def test_models_with_a_state_of_their_own(self, tmp_path, model, sampler):
        config = make_config(phase(3, sampler=sampler), model=model)
        put(config, "data/validation_examples", DIGITS - 2 * BATCH_SIZE)  # 2 steps
        put(config, "eval_every_epochs", 0)
        loop.train_and_evaluate(config, tmp_path / "whole")
        interrupt(config, tmp_path / "stopped", 1)
        loop.train_and_evaluate(config, tmp_path / "stopped")
        saved = [at_step(tmp_path / name, 3) for name in ("stopped", "whole")]
        assert_same_checkpoints(*saved)


class TestOrder:
    """Evaluation and checkpoint see the state before the step; then it is shrunk."""

    @pytest.mark.parametrize("step", [4, 8])
    def test_evaluation_and_checkpoint_see_one_state(self, whole_run, step):
        (line,) = [
            x
            for x in metric_lines(whole_run["workdir"])
            if x["step"] == step and "validation/1.0/loss" in x
        ]
        row = support.evaluate(whole_run["checkpoints"] / str(step), "validation")
        assert line["validation/1.0/accuracy"] == row["accuracy"]
        assert line["validation/1.0/loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert line["validation/1.0/params"] == row["params"]

    def test_checkpoint_n_holds_n_updates(self, stopped_run):
        """The one at step 3 is the initial state after steps 0, 1 and 2, by hand."""
        run = open_run(to_json(two_phases()))
        running = phases.build_phases(run.config["phases"])[0].begin(0, 8, None)
        structure, state = new_state(run.fresh_model(), running, 0)
        root_key = jax.random.key(run.config["seed"])
        step = make_train_step(structure, running, run.task, root_key)
        batches = run.data.train_batches(BATCH_SIZE, seed=run.config["seed"])
        for _ in range(3):
            state, _ = step(state, next(batches))
        stored = stored_arrays(at_step(stopped_run, 3))
        for key, array in checkpoint.flatten(state.params).items():
            np.testing.assert_array_equal(stored[f"params/{key}"], array, err_msg=key)
        assert int(stored["sampler/position"]) == 3

    def test_the_optimizer_starts_anew_with_a_phase(self, whole_run):
        """The checkpoint between two phases is the start of the second one."""
        between = stored_arrays(at_step(whole_run["workdir"], 8))
        counts = [array for key, array in between.items() if key.endswith("count")]
        assert counts and not any(counts)
        last = stored_arrays(at_step(whole_run["workdir"], 12))
        counts = [array for key, array in last.items() if key.endswith("count")]
        assert all(count == 4 for count in counts)


class TestTraces:
    def test_ranks_change_without_recompiling(self, whole_run):
        """One trace of the step for each set of shapes of a phase, whatever the
        ranks."""
        traces = whole_run["traces"]
        assert len(traces) == len(set(traces))

    def test_a_shrink_costs_one_more(self, whole_run):
        maestro = [ranks for tag, ranks in whole_run["traces"] if tag == "maestro"]
        nested = [ranks for tag, ranks in whole_run["traces"] if tag == "nested"]
        assert len(maestro) == 2  # at step 8 the phase ends before it runs again
        assert len(nested) == 1

    def test_resuming_traces_once(self, tmp_path):
        workdir = tmp_path / "run"
        config = make_config(
            phase(
                6,
                sampler=named("independent"),
                penalties=(counter("resumed"),),
            )
        )
        TRACES.clear()
        checked = traces_of_checks(config)
        assert checked
        interrupt(config, workdir, 2)
        loop.train_and_evaluate(config, workdir)
        assert len(TRACES) == checked + 2  # a run that goes on was checked before


class TestShrinking:
    def test_ranks_fall_and_are_in_the_checkpoint(self, whole_run):
        full = {"head": 10, "hidden/0": 16}
        after = [
            checkpoint.open_checkpoint(whole_run["checkpoints"] / str(step)).metadata
            for step in (4, 8, 12)
        ]
        ranks = [full, *(metadata["ranks"] for metadata in after)]
        assert all(metadata["ranks"] == metadata["max_ranks"] for metadata in after)
        assert sum(ranks[1].values()) < sum(full.values())
        assert all(ranks[2][path] <= ranks[1][path] <= full[path] for path in full)
        assert ranks[3] == ranks[2]  # the second phase does not shrink

    def test_optimizer_and_sampler_state_are_cut_with_the_parameters(self, whole_run):
        arrays = stored_arrays(at_step(whole_run["workdir"], 4))
        metadata = at_step(whole_run["workdir"], 4).metadata
        ranks, rank_axes = metadata["ranks"], metadata["rank_axes"]
        for path, rank in ranks.items():
            shapes = [
                array.shape[axes[0]]
                for key, array in arrays.items()
                for name, axes in rank_axes.items()
                if key.endswith(name) and name.startswith(f"{path}/")
            ]
            assert shapes == [rank] * 4  # u and v, and the momentum of each
        momentum = [a for k, a in arrays.items() if k.startswith("opt_state")]
        assert momentum and all(np.any(array) for array in momentum)
        assert len(arrays["sampler/order"]) == sum(ranks.values())

    def test_the_sampler_goes_on_with_the_pairs_that_are_left(
        self, whole_run, stopped_run
    ):
        """In their order; what was taken before the cut at step 4 stays taken."""
        before, saved = at_step(stopped_run, 3), at_step(whole_run["workdir"], 4)
        old, new = stored_arrays(before), stored_arrays(saved)
        limits = list(saved.metadata["ranks"].values())

        def pairs(arrays: dict[str, np.ndarray]) -> list[tuple[int, int]]:
            layers, ranks = arrays["sampler/layers"], arrays["sampler/ranks"]
            return [(int(layers[n]), int(ranks[n])) for n in arrays["sampler/order"]]

        left = [(layer, rank) for layer, rank in pairs(old) if rank <= limits[layer]]
        assert pairs(new) == left != pairs(old)
        taken = sum(pair in left for pair in pairs(old)[:4])
        assert int(new["sampler/position"]) == taken

    def test_every_cut_is_said(self, whole_run):
        said = re.findall(r"shrink (\S+): rank (\d+) -> (\d+)", whole_run["stderr"])
        ranks = {"head": 10, "hidden/0": 16}
        for path, old, new in said:
            assert int(old) == ranks[path] > int(new)
            ranks[path] = int(new)
        final = checkpoint.open_checkpoint(whole_run["checkpoints"]).metadata["ranks"]
        assert ranks == final

    def test_metrics_are_logged(self, whole_run):
        lines = metric_lines(whole_run["workdir"])
        train = [line for line in lines if "train/loss" in line]
        assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
        keys = {f"train/{name}" for name in ("penalty", "accuracy", "gradient_norm")}
        assert all(keys | {"train/examples_per_s"} <= set(line) for line in train)
        assert {"train/loss_pass_0", "train/loss_pass_2"} <= set(train[-1])
        evaluated = [line for line in lines if "validation/0.5/accuracy" in line]
        assert [line["step"] for line in evaluated] == [4, 8, 12]
        assert list((whole_run["workdir"] / "tensorboard").iterdir())
        frontier = whole_run["result"]["frontier"]
        assert [row["rank_fraction"] for row in frontier] == [1.0, 0.5]
        assert frontier[1]["params"] < frontier[0]["params"]
        assert frontier[0]["accuracy"] == evaluated[-1]["validation/1.0/accuracy"]

    def test_control_without_the_lasso_no_rank_falls(self, tmp_path):
        config = two_phases(weight=0.0)
        config["phases"] = [{**config["phases"][0], "until": {"steps": 5}}]
        loop.train_and_evaluate(config, tmp_path / "run")
        metadata = checkpoint.open_checkpoint(tmp_path / "run").metadata
        assert metadata["ranks"] == {"head": 10, "hidden/0": 16}


# One step by itself.


def step_parts(model: str, sampler: dict[str, Any], **changes: Any):
    """Model, structure, state, batch and the step under plain SGD of rate 1."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 8, 8, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, size=6), jnp.int32),
    }
    only = phase(
        1,
        sampler=sampler,
        optimizer=common.optimizer("sgd", learning_rate=1.0),
        **changes,
    )
    config = make_config(only, model=model)
    config["task"]["args"] |= {"mean": [0.0], "std": [1.0]}  # images as they are
    run = open_run(to_json(config))
    network, running = run.fresh_model(), begin(config["phases"][0])
    structure, state = new_state(network, running, 0)
    step = make_train_step(structure, running, run.task, jax.random.key(0))
    return network, structure, state, batch, step


def logits_at(network: nnx.Module, fraction: float, images: Any) -> np.ndarray:
    """Logits in training mode at a fraction of the ranks, in float64."""
    network = nnx.clone(network)
    network.train()
    ranks = {p: -(-r * fraction // 1) for p, r in max_ranks(network).items()}
    set_ranks(network, {path: int(rank) for path, rank in ranks.items()})
    return np.asarray(network(images), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def matryoshka(*fractions: float) -> dict[str, Any]:
    return named("matryoshka", fractions=fractions)


def full_teacher(target_weight: float = 0.0) -> dict[str, Any]:
    return named("full", target_weight=target_weight)


class TestDistillation:
    @pytest.mark.parametrize("target_weight", [0.0, 0.25])
    @pytest.mark.parametrize("passes_loss", ["mean", "sum"])
    def test_losses_by_numpy(self, target_weight, passes_loss):
        """The first pass learns from the labels, the others from it and the labels."""
        fractions = (1.0, 0.5, 0.25)
        network, _, state, batch, step = step_parts(
            "mlp",
            matryoshka(*fractions),
            teacher=full_teacher(target_weight),
            passes_loss=passes_loss,
        )
        logs_of = [
            log_softmax(logits_at(network, f, batch["image"])) for f in fractions
        ]
        labels = np.asarray(batch["label"])
        hard = [-one[np.arange(6), labels].mean() for one in logs_of]
        soft = [-(np.exp(logs_of[0]) * one).sum(-1).mean() for one in logs_of]
        others = [
            target_weight * h + (1 - target_weight) * s
            for h, s in zip(hard[1:], soft[1:], strict=True)
        ]
        _, metrics = step(state, batch)
        found = [float(metrics[f"loss_pass_{n}"]) for n in range(3)]
        np.testing.assert_allclose(found, [hard[0], *others], rtol=1e-5)
        added = np.mean(others) if passes_loss == "mean" else np.sum(others)
        np.testing.assert_allclose(metrics["loss"], hard[0] + added, rtol=1e-5)

    def test_the_teacher_gets_no_gradient(self):
        """The gradient is that of the formula with the targets as constants."""
        network, structure, state, batch, step = step_parts(
            "mlp", matryoshka(1.0, 0.5), teacher=full_teacher()
        )
        targets = jnp.asarray(
            np.exp(log_softmax(logits_at(network, 1.0, batch["image"]))), jnp.float32
        )
        half = {"head": 5, "hidden/0": 8}

        def formula(params: Any) -> jax.Array:
            model = structure.merge(params, state.model_state, jax.random.key(0))
            full = jax.nn.log_softmax(model(batch["image"]))
            loss = -full[jnp.arange(6), batch["label"]].mean()
            set_ranks(model, half)
            student = jax.nn.log_softmax(model(batch["image"]))
            return loss - (targets * student).sum(axis=-1).mean()

        expected = jax.grad(formula)(state.params)
        before = jax.tree.map(np.array, state.params)
        after, _ = step(state, batch)
        for key, gradient in checkpoint.flatten(expected).items():
            old = checkpoint.flatten(before)[key]
            new = checkpoint.flatten(after.params)[key]
            assert relative_error(old - np.asarray(new), gradient) < 2e-5, key

    def test_a_full_pass_is_added_to_a_sampler_without_one(self):
        sampler = named("uniform_fraction", fractions=(0.25,))
        network, _, state, batch, step = step_parts(
            "mlp", sampler, teacher=full_teacher()
        )
        full, quarter = (
            log_softmax(logits_at(network, f, batch["image"])) for f in (1.0, 0.25)
        )
        _, metrics = step(state, batch)
        expected = -(np.exp(full) * quarter).sum(axis=-1).mean()
        np.testing.assert_allclose(metrics["loss_pass_1"], expected, rtol=1e-5)

    def test_the_first_pass_alone_updates_batch_norm(self):
        network, _, state, batch, step = step_parts(
            "convnet", matryoshka(1.0, 0.5, 0.25)
        )
        alone = nnx.clone(network)
        alone.train()
        alone(batch["image"])
        expected = checkpoint.flatten(model_state_of(alone))
        before = {
            k: np.array(x) for k, x in checkpoint.flatten(state.model_state).items()
        }
        after, _ = step(state, batch)
        found = checkpoint.flatten(after.model_state)
        assert found.keys() == expected.keys() and found
        for key, array in expected.items():
            assert relative_error(found[key], array) < 1e-6, key
            assert np.any(before[key] != np.asarray(found[key])), key


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    """An epoch and a half of the dense model."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    config = make_config(phase(6), rank_rules=((".*", "dense"),))
    loop.train_and_evaluate(config, workdir)
    return workdir


class TestInitFrom:
    def test_a_dense_checkpoint_is_factorized(self, dense_run, tmp_path):
        """One step at rate 0: the low-rank model does what the dense one did."""
        still = common.optimizer("sgd", learning_rate=0.0)
        config = make_config(phase(1, optimizer=still), init_from=str(dense_run))
        loop.train_and_evaluate(config, tmp_path / "run")
        dense = support.evaluate(dense_run)
        here = support.evaluate(tmp_path / "run")
        assert dense["accuracy"] > 0.3  # it has learned
        assert here["accuracy"] == dense["accuracy"]
        assert here["loss"] == pytest.approx(dense["loss"], rel=1e-5)
        assert (dense["ranks"], here["ranks"]) == ({}, {"head": 10, "hidden/0": 16})

    def test_a_truncated_checkpoint_trains_on(self, whole_run, tmp_path):
        cut = tmp_path / "cut"
        support.truncate(whole_run["workdir"], cut, "rank_fraction", 0.5)
        config = make_config(phase(8), init_from=str(cut))
        loop.train_and_evaluate(config, tmp_path / "run")
        before = support.evaluate(cut, "train")
        after = support.evaluate(tmp_path / "run", "train")
        assert after["ranks"] == before["ranks"]
        assert after["loss"] < before["loss"]

    @pytest.mark.parametrize(
        "changes, message",
        [
            (
                {"model": "convnet"},
                "config.init_from: must be a checkpoint of the same",
            ),
            ({"rank_rules": ((".*", "dense"),)}, "config.rank_rules: .*'hidden/0'"),
        ],
    )
    def test_of_another_model_is_refused(self, whole_run, tmp_path, changes, message):
        source = str(whole_run["workdir"])
        config = make_config(phase(1), init_from=source, **changes)
        with pytest.raises(ValueError, match=message):
            loop.train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


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


class TestOptimizer:
    @pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "lamb", "lion"])
    def test_kernels_and_factors_decay_biases_and_norms_do_not(self, name):
        """Updates of a step without gradient."""
        rules = (("head", "dense"), (".*", "full"))
        model = fresh_model(make_config(phase(1), model="convnet", rank_rules=rules))
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        spec = common.optimizer(name, learning_rate=0.5, weight_decay=0.1)
        optimizer = optim.Optimizer.build(spec).make(10)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        moved = {key for key, x in checkpoint.flatten(updates).items() if np.any(x)}
        names = {key: key.split("/")[-1] for key in checkpoint.flatten(params)}
        assert set(names.values()) == {"u", "v", "kernel", "bias", "scale"}
        assert moved == {k for k, n in names.items() if n in ("u", "v", "kernel")}
        if name in ("adamw", "sgd"):
            for key in moved:
                update, value = (checkpoint.flatten(t)[key] for t in (updates, params))
                assert relative_error(update, -0.05 * np.asarray(value)) < 1e-6

    def test_clipping_is_by_the_global_norm(self):
        spec = common.optimizer("sgd", learning_rate=1.0, clip_norm=2.0)
        optimizer = optim.Optimizer.build(spec).make(10)
        params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
        for scale, expected in ((1.0, 2 / 3), (0.1, 0.1)):
            gradient = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0])}
            gradient = jax.tree.map(lambda x, scale=scale: scale * x, gradient)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            np.testing.assert_allclose(updates["a"], [-expected, -2 * expected], 1e-6)
            np.testing.assert_allclose(updates["b"], [-2 * expected], 1e-6)

    @pytest.mark.parametrize(
        "name, args, values",
        [
            ("constant", {"warmup_steps": 0}, {0: 2.0, 9: 2.0}),
            ("constant", {"warmup_steps": 4}, {0: 0.0, 2: 1.0, 4: 2.0, 9: 2.0}),
            (
                "cosine",
                {"warmup_steps": 0, "final_fraction": 0.1},
                {0: 2.0, 5: 1.1, 10: 0.2},
            ),
            (
                "cosine",
                {"warmup_steps": 2, "final_fraction": 0.0},
                {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.0, 10: 0.0},
            ),
            (
                "steps",
                {"factor": 0.1, "at_fractions": [0.5, 0.8]},
                {0: 2.0, 4: 2.0, 6: 0.2, 9: 0.02},
            ),
            (  # two fractions that fall on one step
                "steps",
                {"factor": 0.1, "at_fractions": [0.51, 0.59]},
                {4: 2.0, 7: 0.02},
            ),
        ],
    )
    def test_schedules(self, name, args, values):
        """The learning rate of a phase of 10 steps, through an update."""
        schedule = {"name": name, "args": args}
        spec = common.optimizer("sgd", learning_rate=2.0, schedule=schedule)
        optimizer = optim.Optimizer.build(spec).make(10)
        state, found = optimizer.init(jnp.zeros(1)), []
        for _ in range(11):
            update, state = optimizer.update(jnp.ones(1), state, jnp.zeros(1))
            found.append(-float(update[0]))
        for step, value in values.items():
            assert found[step] == pytest.approx(value, abs=1e-6), step


OWN_CODE = '''
"""Someone's own model and data."""
import numpy as np
from flax import nnx


class Net(nnx.Module):
    def __init__(self, size, classes, rngs):
        self.layer = nnx.Linear(size, classes, rngs=rngs)

    def __call__(self, images):
        return self.layer(images.reshape(images.shape[0], -1))


def net(*, image_shape, num_classes, rngs):
    return Net(image_shape[0] * image_shape[1] * image_shape[2], num_classes, rngs)


def data(*, examples):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, 3, 2, 1), dtype=np.uint8)
    labels = (images[:, 0, 0, 0] > 127).astype(np.int64)
    train = {"image": images, "label": labels}
    return {"train": train, "test": {key: x[:8] for key, x in train.items()}}
'''


class TestOwnCode:
    def test_model_and_data_by_import_path(self, tmp_path, monkeypatch):
        """They train; from a checkpoint they are imported with consent only."""
        (tmp_path / "own_h7_code.py").write_text(OWN_CODE)
        monkeypatch.syspath_prepend(tmp_path)
        config = make_config(phase(4))
        config["data"] |= {"name": "own_h7_code:data", "args": {"examples": 40}}
        config["data"] |= {"batch_size": 10, "validation_examples": 10}
        config["task"]["args"] |= {"mean": [128.0], "std": [74.0]}
        config["model"] = named("own_h7_code:net")
        workdir = tmp_path / "run"
        interrupt(config, workdir, 2)
        result = loop.train_and_evaluate(config, workdir)
        assert result["step"] == 4 and result["frontier"]
        cut = tmp_path / "cut"
        with pytest.raises(UserError, match="--allow_imports=own_h7_code"):
            support.evaluate(workdir)
        with pytest.raises(UserError, match="--allow_imports=own_h7_code"):
            support.truncate(workdir, cut, "rank", 1)
        allowed = {"allow_imports": ["own_h7_code"]}
        assert support.evaluate(workdir, **allowed)["ranks"] == {"layer": 2}
        support.truncate(workdir, cut, "rank", 1, **allowed)
        assert checkpoint.open_checkpoint(cut).max_ranks == {"layer": 1}


def test_one_rank_per_example_trains(tmp_path):
    sampler = named("per_example", batch_size=BATCH_SIZE)
    adam = common.optimizer("adam", learning_rate=1e-2)
    config = make_config(phase(8, sampler=sampler, optimizer=adam))
    result = loop.train_and_evaluate(config, tmp_path / "run")
    losses = [
        x["train/loss"] for x in metric_lines(tmp_path / "run") if "train/loss" in x
    ]
    assert losses[-1] < losses[0]
    assert result["frontier"][0]["accuracy"] > 0.2
