"""Malformed configs: taken, or refused with one error of ours before any work."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import mutations
import pytest
from flax import nnx
from hypothesis import strategies as st

from configs import (
    bsr,
    common,
    cuttlefish,
    digits_mlp,
    khodak,
    lorita,
    maestro,
    sequential_freezing,
    svd_training,
)
from lowrank_jax import active
from train import phases, start
from train.config import to_json
from train.model import build_model
from train.run import open_run

named = common.named


def on_digits(config: Any, rules: Any) -> dict[str, Any]:
    """The config with digits for data and a small MLP for the model, as JSON."""
    common.digits(config, batch_size=64)
    config.model = named("mlp", hidden=(8,))
    config.rank_rules = rules
    text = json.dumps(config.to_dict())
    for name in ("conv1|fc3", "conv1", "fc3"):
        text = text.replace(f'"{name}"', '"head"')
    return json.loads(text)


def every_part() -> dict[str, Any]:
    """A config with a phase for each sampler, and every penalty, action and selector
    somewhere."""
    ranks = {"head": 8, "hidden/0": 8}
    annealed = {"start": 1.0, "end": 0.1, "anneal_steps": 3}
    samplers = (
        named("sandwich", passes=3, smallest=0.25),
        named("matryoshka", fractions=(1.0, 0.5), family=((0.5, ranks),)),
        named("family", profiles=(ranks, {"head": 2, "hidden/0": 3})),
        named("per_example", batch_size=64, common_fraction=True),
        named("ladder", fractions=(1.0, 0.5), chances=(0.5, 0.5), warmup_steps=2),
        named("geometric", decay=0.5),
        named("uniform_fraction", fractions=(0.5, 1.0)),
        named("independent"),
        named("strata", fractions=((0.5, 0.25),), family="selected"),
    )
    penalties = (
        (named("hierarchical_group_lasso", weight=1e-3), named("l1", weight=0.1)),
        (named("modified_stable_rank", weight=1.0, target_ranks={"head": 2}),),
        (named("funnel", weight=0.1, **annealed),),
        (named("log_determinant", weight=0.1, every_steps=2, **annealed),),
        (named("stable_rank", weight=0.1, every_steps=2),),
    )
    ends = (
        ("energy", {"value": 0.9}),
        ("macs_fraction", {"value": 0.5}),
        ("energy_budget", {"measure": "params", "fraction": 0.9}),
        ("beam", {"measure": "params", "fraction": 0.9, "width": 2, "steps": 2}),
        ("ranks", {"value": {"head": 3}}),
        ("rank", {"value": 6}),
    )
    projection = named("stable_rank_normalization", stable_rank=2.0, every_steps=1)
    made = [
        common.phase(
            name=f"phase_{index}",
            until={"steps": 3},
            sampler=sampler,
            teacher=named("full", target_weight=0.5) if index < 2 else None,
            penalties=penalties[index] if index < len(penalties) else (),
            projections=(projection,) if index == 5 else (),
            optimizer=common.optimizer(
                ("adamw", "sgd", "lion", "lamb", "adafactor", "adam")[index % 6],
                learning_rate=0.1,
                schedule=(
                    common.cosine(warmup_steps=1)
                    if index % 2
                    else common.steps_down(factor=0.5, at_fractions=(0.5,))
                ),
            ),
            shrink={
                "every_epochs": 1,
                "every_steps": 0,
                "threshold": 1e-3,
                "multiple": 2,
                "least_share": 0.1,
            },
            on_end=()
            if index >= len(ends)
            else (
                named("select", selector=named(ends[index][0], **ends[index][1])),
                named("truncate", selector=named("selected")),
                named("recalibrate", batches=1),
                named("select_family", fractions=(0.5, 0.25)),
            ),
        )
        for index, sampler in enumerate(samplers)
    ]
    config = common.base(seed=0)
    config.phases = made
    return on_digits(config, ((".*", {"with_s": True}),))


@functools.cache
def bases() -> dict[str, dict[str, Any]]:
    full = ((".*", "full"),)
    dense = (("head", "dense"), (".*", "dense"))
    some = (("head", "dense"), (".*", {"rank_fraction": 0.5}))
    return {
        "every_part": every_part(),
        "digits_mlp": on_digits(digits_mlp.get_config("smoke"), some),
        "maestro": on_digits(maestro.get_config("smoke"), full),
        "bsr": on_digits(bsr.get_config("smoke"), dense),
        "svd_training": on_digits(
            svd_training.get_config("smoke"), (("head|hidden/0", {"with_s": True}),)
        ),
        "khodak": on_digits(khodak.get_config("smoke"), some),
        "cuttlefish": on_digits(cuttlefish.get_config("smoke"), dense),
        "lorita": on_digits(lorita.get_config("smoke"), ((".*", {"depth": 3}),)),
        "sequential_freezing": on_digits(sequential_freezing.get_config("smoke"), full),
    }


def cases(*names: str) -> st.SearchStrategy[Any]:
    """The name of a config and a few edits of it."""
    return st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), mutations.edits(bases()[name]))
    )


def open_all(config: Any) -> None:
    """What a start does before it traces and writes."""
    config = to_json(config)
    plan = phases.build_phases(config["phases"])
    run = open_run(config)
    model = nnx.eval_shape(
        lambda: build_model(run.config, run.task, allow_imports=None)
    )
    ranks = {path: at.active for path, at in active.rank_limits(model).items()}
    spans = phases.spans(plan, run.steps_per_epoch)
    for phase, (first, end) in zip(plan, spans, strict=True):
        running = phase.begin(first, end, phases.Selected(ranks, []))
        sampler = running.phase.sampler
        if sampler.check is not None:
            sampler.check(ranks)
        sampler.init(ranks)


HIDDEN = ("model", "args", "hidden")
SAMPLER = ("phases", 0, "sampler")
OPTIMIZER = ("phases", 0, "optimizer")

KNOWN: list[tuple[str, mutations.Edits]] = [
    ("maestro", [((*HIDDEN, 0), 1e-320)]),
    ("lorita", [((*HIDDEN, 0), -8)]),
    ("cuttlefish", [((*HIDDEN, 0), 0)]),
    ("digits_mlp", [(HIDDEN, [2**31 - 1, 2**31 - 1])]),  # ended the process
    ("digits_mlp", [(SAMPLER, named("sandwich", passes=2**31 - 1))]),  # traced for ever
    ("digits_mlp", [(("phases", 0, "teacher", "args", "target_weight"), "0.0")]),
    ("digits_mlp", [(SAMPLER, named("builtins:dict"))]),
    ("digits_mlp", [(SAMPLER, named("types:SimpleNamespace"))]),
    ("digits_mlp", [(("phases", 0, "trainable", 0), "(" * 3000 + ")" * 3000)]),
    ("digits_mlp", [((*OPTIMIZER, "decayed"), "(.*)*x")]),
    ("digits_mlp", [((*OPTIMIZER, "args", "mu_dtype"), "no such")]),
    ("maestro", [((*OPTIMIZER, "schedule", "args", "warmup_steps"), "0")]),
    ("lorita", [(("rank_rules", 0, 1, "depth"), 2**31 - 1)]),
]
"""What once ended in another error, or not at all."""


@pytest.mark.parametrize("name", bases())
def test_the_configs_are_good(name):
    """What is changed below is taken as it is."""
    open_all(bases()[name])


@mutations.TIMES
def test_values_in_a_config(times):
    def check(case: Any) -> None:
        name, edits = case
        config = mutations.changed(bases()[name], edits)
        mutations.refused(lambda: open_all(config))

    mutations.campaign(check, cases(*bases()), "configs", times, KNOWN)


def _start(config: Any, workdir: Path) -> None:
    with contextlib.ExitStack() as resources:
        start.start_run(config, workdir, resources)


@mutations.TIMES
def test_a_start_leaves_nothing_behind(tmp_path, times):
    def check(case: Any) -> None:
        name, edits = case
        config = mutations.changed(bases()[name], edits)
        workdir = tmp_path / "run"
        if mutations.refused(lambda: _start(config, workdir)):
            assert not list(tmp_path.iterdir())
        else:
            (workdir / "config.json").unlink()
            workdir.rmdir()

    mutations.campaign(check, cases("digits_mlp", "maestro", "khodak"), "starts", times)


@pytest.mark.parametrize("what", mutations.UNREADABLE)
def test_what_no_config_can_hold(what):
    value = mutations.UNREADABLE[what]
    for key in ("seed", "phases", "model"):
        config = {**bases()["digits_mlp"], key: value}
        assert mutations.refused(lambda config=config: to_json(config))
    assert mutations.refused(lambda: to_json(value))
