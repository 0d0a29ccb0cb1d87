"""The real training loop on real digits: a run of two phases, stopped and not.

How it resumes, in which order it works, what it traces, how it shrinks, and how other
runs start from its checkpoints; the models have a few hundred numbers.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import support
from loop_configs import (
    BATCH_SIZE,
    TRACES,
    count_traces,
    counter,
    make_config,
    phase,
    traces_of_checks,
    two_phases,
)
from support import (
    DIGITS,
    assert_same_checkpoints,
    at_step,
    compiled_anew,
    interrupt,
    metric_lines,
    put,
    stored_arrays,
)

from configs import common
from lowrank_jax import checkpoint, penalties
from train import loop, phases
from train.config import to_json
from train.data import pipeline
from train.report import curve_plots
from train.run import open_run
from train.state import new_state
from train.step import make_train_step

named = common.named


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
            pytest.param("vit", named("full"), marks=pytest.mark.slow),  # dropout
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


class TestCourse:
    """A run's metrics say when it became another one."""

    def test_shrinks_and_ends_of_phases_are_told(self, whole_run, stopped_run):
        """With the parameters that the checkpoint of that step holds; a run that was
        stopped tells the same."""
        whole, stopped = map(curve_plots.read, (whole_run["workdir"], stopped_run))
        assert whole.events() == stopped.events()
        assert (4, "shrink") in whole.events()
        assert (8, "end of maestro") in whole.events()
        steps, stored = whole.of("model/stored")
        assert steps[0] == 0 and stored[0] > stored[-1]
        for step, number in zip(steps[1:], stored[1:], strict=True):
            arrays = stored_arrays(at_step(whole_run["workdir"], step))
            held = [x.size for key, x in arrays.items() if key.startswith("params/")]
            assert number == sum(held)


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
        running = phases.build_phases(run.config["phases"])[0].begin(0, 8)
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
