"""What a phase's parts carry from step to step, over stops and over cuts.

The real loop on digits in epochs of 4 steps; a shrink comes at every epoch's end.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import support
from loop_configs import SHRINK
from support import (
    assert_same_checkpoints,
    at_step,
    begin,
    fresh_model,
    interrupt,
    stored_arrays,
    train,
)

from configs import common
from lowrank_jax import checkpoint
from lowrank_jax.active import set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.pieces import seal
from train.config import to_json
from train.run import open_run
from train.state import new_state
from train.step import make_train_step

named = common.named
FULL = {"head": 10, "hidden/0": 16}
PLAIN = common.optimizer("sgd", learning_rate=0.1)
SGD = common.optimizer("sgd", learning_rate=0.1, args={"momentum": 0.5})
LASSO = named("hierarchical_group_lasso", weight=0.05)


def phase(steps: int, **changes: Any) -> dict[str, Any]:
    values = {"name": "only", "optimizer": SGD, **changes}
    return common.phase(until={"steps": steps}, **values)


def make_config(*phases: Mapping[str, Any]) -> dict[str, Any]:
    return support.make_config(*phases, model=named("mlp", hidden=(16,)))


# A penalty and a sampler with a state, in a run that shrinks.

SMOOTHING = {"start": 1.0, "end": 0.01, "anneal_steps": 8}
EVERY_STEPS = 3


def stateful() -> dict[str, Any]:
    """Refreshes at steps 0, 3, 6 and 9; cuts at 4, 8 and 12; warm-up to step 6."""
    log_determinant = named(
        "log_determinant", weight=0.01, every_steps=EVERY_STEPS, **SMOOTHING
    )
    ladder = named(
        "ladder", fractions=(1.0, 0.5, 0.25), chances=(0.4, 0.3, 0.3), warmup_steps=6
    )
    return make_config(
        phase(12, sampler=ladder, penalties=(LASSO, log_determinant), shrink=SHRINK)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody stops."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(stateful(), workdir)
    return workdir


class TestState:
    def test_it_is_in_the_checkpoint(self, whole):
        saved = at_step(whole, 4)
        assert {"penalties", "sampler"} <= saved.metadata["arrays"].keys()
        arrays, ranks = stored_arrays(saved), saved.metadata["ranks"]
        assert sum(ranks.values()) < sum(FULL.values())  # it was cut
        for path, rank in ranks.items():
            assert arrays[f"sampler/tables/{path}"].max() == rank
            assert arrays[f"penalties/1/left/{path}"].shape[-1] == rank

    @pytest.mark.parametrize("stops", [(5,), (2, 4, 7)], ids=str)
    def test_resuming_equals_not_stopping(self, whole, tmp_path, stops):
        """In every bit: between two refreshes, at a cut, after the warm-up."""
        for step in stops:
            interrupt(stateful(), tmp_path / "run", step)
        train(stateful(), tmp_path / "run")
        for step in (8, 12):
            assert_same_checkpoints(
                at_step(tmp_path / "run", step), at_step(whole, step)
            )

    def test_a_penalty_keeps_over_a_cut_what_it_can(self, whole):
        """At step 4 the smoothing is that of step 3, where P was made, not step 0's."""
        arrays = stored_arrays(at_step(whole, 4))
        start, end, steps = SMOOTHING.values()
        expected = start * (end / start) ** (EVERY_STEPS / steps)
        assert float(arrays["penalties/1/smoothing"]) == pytest.approx(expected)


def still(before: checkpoint.Saved, after: checkpoint.Saved) -> dict[str, list[int]]:
    """The columns of each layer's u that did not move between two checkpoints."""
    old, new = stored_arrays(before), stored_arrays(after)
    keys = {path: f"params/{path}/factors/u" for path in FULL}
    return {
        path: np.flatnonzero((old[key] == new[key]).all(axis=0)).tolist()
        for path, key in keys.items()
    }


def test_a_curriculum_counts_from_the_phase_and_goes_on_over_a_cut(tmp_path):
    """A warm-up of 4 steps from step 2 on, cut at step 4, then always the half rung.

    Columns past a sampled rank stand still under plain SGD.
    """
    half = named("ladder", fractions=(1.0, 0.5), chances=(0.0, 1.0), warmup_steps=4)
    config = make_config(
        phase(2, name="first", optimizer=PLAIN),
        phase(
            6,
            name="ladder",
            optimizer=PLAIN,
            sampler=half,
            shrink={**SHRINK, "threshold": 0.8},
        ),
    )
    for step in (4, 5, 6, 7):
        interrupt(config, tmp_path / "run", step)
    saved = {step: at_step(tmp_path / "run", step) for step in (4, 5, 6, 7)}
    ranks = saved[4].metadata["ranks"]
    assert sum(ranks.values()) < sum(FULL.values())
    assert all(rank > FULL[path] // 2 for path, rank in ranks.items())
    for step in (4, 5):
        assert still(saved[step], saved[step + 1]) == {path: [] for path in FULL}
    tails = {path: [*range(FULL[path] // 2, rank)] for path, rank in ranks.items()}
    assert still(saved[6], saved[7]) == tails


FAMILY = [FULL, {"head": 5, "hidden/0": 8}]


def test_a_family_is_lowered_where_the_run_shrinks(tmp_path):
    config = make_config(
        phase(
            8,
            sampler=named("family", profiles=FAMILY),
            penalties=(LASSO,),
            shrink=SHRINK,
        )
    )
    saved = train(config, tmp_path / "run")
    ranks = saved.metadata["ranks"]
    assert saved.step == 8 and sum(ranks.values()) < sum(FULL.values())
    arrays = stored_arrays(saved)
    for path, rank in ranks.items():
        expected = [min(rank, profile[path]) for profile in FAMILY]
        assert arrays[f"sampler/tables/{path}"].tolist() == expected


@pytest.mark.parametrize("least_share, cut_at", [(0.0, {4, 8, 12}), (0.95, {12})])
def test_a_cut_waits_until_it_takes_its_share(tmp_path, least_share, cut_at):
    """New shapes are compiled anew; the last cut of a phase never waits."""
    rule = {**SHRINK, "least_share": least_share}
    lasso = {**LASSO, "args": {"weight": 0.1}}
    config = make_config(
        phase(12, sampler=named("single_layer"), penalties=(lasso,), shrink=rule)
    )
    workdir, before, found = tmp_path / "run", FULL, set()
    for step in (4, 8, 12):
        if step < 12:
            interrupt(config, workdir, step)
        else:
            train(config, workdir)
        ranks = at_step(workdir, step).metadata["ranks"]
        found |= {step} if ranks != before else set()
        before = ranks
    assert found == cut_at


@pytest.mark.parametrize("key", ["done", "run"])
def test_a_run_that_remembers_too_little_is_refused(tmp_path, key):
    """As one of an older version; before any work."""
    config = make_config(phase(4))
    interrupt(config, tmp_path / "run", 2)
    saved = at_step(tmp_path / "run", 2)
    metadata = dict(saved.metadata)
    if key == "done":
        del metadata["done"]
    else:
        metadata["run"] = {"phase": 0, "phase_start": 0}
    (saved.path / "metadata" / "metadata").write_text(json.dumps(seal(metadata)))
    with pytest.raises(UserError, match="^--workdir: must hold a run of this version"):
        train(config, tmp_path / "run")


# Weight decay and masked columns.

HALF = {"head": 5, "hidden/0": 8}
DECAYING = {
    name: dict(learning_rate=0.1, weight_decay=1e-2) for name in ("sgd", "adamw")
}
PASSES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    # how the second half of the columns comes to be masked; or it is used all the same
    "sampled": ({"sampler": named("uniform_fraction", fractions=(0.5,))}, False, True),
    "set": ({}, True, True),
    "set, with a full teacher": (
        {
            "sampler": named("uniform_fraction", fractions=(0.5,)),
            "teacher": named("full", target_weight=0.5),
        },
        True,
        True,
    ),
    "used by one of two passes": (
        {"sampler": named("matryoshka", fractions=(1.0, 0.5))},
        False,
        False,
    ),
}


def tail_after(changes: Mapping[str, Any], columns: str, name: str, is_set: bool):
    """The second half of u and v of each layer, before and after ten steps."""
    optimizer = common.optimizer(name, decay_columns=columns, **DECAYING[name])
    config = to_json(make_config(phase(10, optimizer=optimizer, **changes)))
    run, running = open_run(config), begin(config["phases"][0])
    model = fresh_model(config)
    if is_set:
        set_ranks(model, HALF)

    def tails(params: Any) -> dict[str, np.ndarray]:
        return {
            f"{path}/{key}": np.array(
                params[path]["factors"][key][
                    np.s_[:, half:] if key == "u" else np.s_[half:]
                ]
            )
            for path, half in HALF.items()
            for key in "uv"
        }

    structure, state = new_state(model, running, 0)
    before = tails(_by_layer(state.params))
    step = make_train_step(structure, running, run.task, jax.random.key(0))
    batches = run.data.train_batches(65, seed=0)
    for _ in range(10):
        state, _ = step(state, next(batches))
    return before, tails(_by_layer(state.params))


def _by_layer(params: Any) -> dict[str, Any]:
    return {"head": params["head"], "hidden/0": params["hidden"][0]}


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("passes", PASSES)
def test_decay_of_active_columns_spares_what_no_pass_uses(passes, name):
    """What is masked stays as it is; with "all" it withers to 0.999^10."""
    changes, is_set, is_masked = PASSES[passes]
    before, after = tail_after(changes, "active", name, is_set)
    withered = {}
    if is_masked:
        _, withered = tail_after(changes, "all", name, is_set)
    for key, array in before.items():
        if not is_masked:
            assert not np.array_equal(after[key], array)
            continue
        np.testing.assert_array_equal(after[key], array)
        ratio = np.linalg.norm(withered[key]) / np.linalg.norm(array)
        assert ratio == pytest.approx(0.999**10, rel=1e-5)
