"""What is found before step 0: parts that do not work, models with a bug, actions that
cannot follow one another. And what the config of a checkpoint says."""

import inspect
import traceback
from pathlib import Path
from typing import Any

import pytest
import support
from support import assert_same_checkpoints, interrupt, put, train

from configs import common
from lowrank_jax import checkpoint, penalties, projections, samplers
from lowrank_jax.errors import UserError
from train import actions, loop, optim, registry, teachers, until
from train.models import MODELS
from train.selecting import TABLE
from train.tasks import TASKS

named = common.named
SGD = common.optimizer("sgd", learning_rate=0.1)


def phase(steps: int = 4, **changes: Any) -> dict[str, Any]:
    values = {"name": "only", "optimizer": SGD, **changes}
    return common.phase(until={"steps": steps}, **values)


def make_config(*phases: Any, **changes: Any) -> dict[str, Any]:
    values = {"model": named("mlp", hidden=(16,)), **changes}
    return support.make_config(*(phases or (phase(),)), **values)


def refuse(config: dict[str, Any], workdir: Path, kind: type[Exception]) -> Exception:
    """Runs a config that must fail before anything is written; returns its error."""
    with pytest.raises(kind) as caught:
        loop.train_and_evaluate(config, workdir)
    assert type(caught.value) is kind
    assert not workdir.exists()
    return caught.value


class TestParts:
    def test_a_family_above_the_ranks(self, tmp_path):
        profiles = [{"head": 11, "hidden/0": 16}, {"head": 5, "hidden/0": 8}]
        sampler = named("family", profiles=profiles)
        error = refuse(make_config(phase(sampler=sampler)), tmp_path / "run", UserError)
        for part in (
            "config.phases[0] (only)",
            "family.profiles[0]",
            "head",
            "10",
            "11",
        ):
            assert part in str(error)

    @pytest.mark.parametrize("slot", ["penalties", "projections"])
    def test_what_keeps_something_in_a_closure(self, tmp_path, slot):
        name = "penalty" if slot == "penalties" else "projection"
        part = named(f"own_parts:forgetful_{name}")
        error = refuse(
            make_config(phase(**{slot: (part,)})), tmp_path / "run", UserError
        )
        for part in ("config.phases[0] (only)", name, "keeps", "init(model)", "apply("):
            assert part in str(error)

    @pytest.mark.parametrize(
        "fault, words",
        [
            ("no weight", ("sums", "'weight'", "'accuracy'")),
            ("no scalar", ("sums", "scalars", "loss", "(1,)")),
            ("no headline", ("figures", "'bleu'", "'accuracy'")),
            ("no loss", ("figures", "'loss'", "'accuracy'")),
        ],
    )
    def test_a_task_whose_evaluation_does_not_hold(self, tmp_path, fault, words):
        config = make_config(task=named("own_parts:task", fault=fault))
        error = refuse(config, tmp_path / "run", UserError)
        for part in ("config.task", *words):
            assert part in str(error)


class TestModels:
    """A bug in someone's own model is theirs: its type and its place stay."""

    @pytest.mark.parametrize(
        "fault, kind",
        [
            ("shape", TypeError),  # JAX's own
            ("evaluation", TypeError),
            ("ValueError", ValueError),
            ("TypeError", TypeError),
        ],
    )
    def test_it_shows_before_step_0(self, tmp_path, fault, kind):
        config = make_config(
            phase(name="mine"),
            model=named("own_parts:net", fault=fault),
        )
        error = refuse(config, tmp_path / "run", kind)
        note = error.__notes__[-1]
        assert "(mine)" in note and "before the first step" in note
        frames = traceback.extract_tb(error.__traceback__)
        assert any(frame.filename.endswith("own_parts.py") for frame in frames)
        if fault.endswith("Error"):
            assert str(error) == "my own bug"

    def test_the_control_runs(self, tmp_path):
        config = make_config(model=named("own_parts:net"))
        assert loop.train_and_evaluate(config, tmp_path / "run")["step"] == 4


def truncate(name: str, value: Any) -> dict[str, Any]:
    return named("truncate", selector=named(name, value=value))


class TestActions:
    @pytest.mark.parametrize(
        "first",
        [("rank", 4), ("rank_fraction", 0.4), ("ranks", {"head": 4})],
        ids=lambda choice: choice[0],
    )
    @pytest.mark.parametrize("apart", [False, True], ids=["one end", "two phases"])
    def test_ranks_above_what_an_earlier_cut_left(self, tmp_path, first, apart):
        """In the phase and by the action that the run would die in."""
        cuts = truncate(*first), truncate("ranks", {"head": 6})
        if apart:
            plan = [phase(on_end=cuts[:1]), phase(name="next", on_end=cuts[1:])]
        else:
            plan = [phase(on_end=cuts)]
        error = refuse(make_config(*plan), tmp_path / "run", UserError)
        place = f"({'next' if apart else 'only'}): on_end (truncate)"
        for part in (place, "head", "[0, 4]", "6"):
            assert part in str(error)

    def test_ranks_that_an_earlier_cut_by_energy_may_leave(self, tmp_path):
        """What depends on the weights is not known before: the cut may be none."""
        cuts = truncate("energy", 0.999999), truncate("ranks", {"head": 6})
        saved = train(make_config(phase(on_end=cuts)), tmp_path / "run")
        assert saved.metadata["ranks"]["head"] == 6

    def test_a_sampler_that_no_longer_fits(self, tmp_path):
        """The next phase is checked on the model that it will have."""
        family = named("family", profiles=[{"head": 8, "hidden/0": 8}])
        plan = (
            phase(on_end=(truncate("rank", 4),)),
            phase(name="next", sampler=family),
        )
        error = refuse(make_config(*plan), tmp_path / "run", UserError)
        assert "config.phases[1] (next)" in str(error) and "profiles[0]" in str(error)

    @pytest.mark.parametrize(
        "on_end, words",
        [
            ((truncate("ranks", {"hed": 3}),), ("truncate", "hed")),
            (
                (named("merge"), truncate("rank", 4), truncate("ranks", {"head": 1})),
                ("truncate", "head"),
            ),
            ((named("truncate", selector=named("selected")),), ("select",)),
        ],
        ids=["unknown path", "merged before", "nothing selected"],
    )
    def test_what_cannot_be_done(self, tmp_path, on_end, words):
        config = make_config(phase(on_end=on_end))
        error = refuse(config, tmp_path / "run", UserError)
        for part in ("config.phases[0] (only): on_end", *words):
            assert part in str(error)


# The config that is saved says everything.

OWN = {
    "model": ("net", {"fault": ""}),
    "task": ("task", {"fault": ""}),
    "phases/0/sampler": ("sampler", {"smallest": 0.5}),
    "phases/0/teacher": ("teacher", {"target_weight": 0.5}),
    "phases/0/penalties/0": ("penalty", {"weight": 0.01}),
    "phases/0/projections/0": ("projection", {"stable_rank": 2.0}),
    "phases/0/until/condition": ("condition", {"every_steps": 2}),
    "phases/0/on_end/1/args/selector": ("selector", {"value": 4}),
    "phases/1/on_end/1": ("action", {"rules": [[".*", "full"]]}),
    "phases/0/optimizer/schedule": ("schedule", {"floor": 0.0}),
}
"""Each choice of a config, with the argument that it need not give."""


def own_config(*, whole: bool) -> dict[str, Any]:
    """A config with these parts, with or without their optional arguments."""
    parts = {
        place: named(f"own_parts:{name}", **(args if whole else {}))
        for place, (name, args) in OWN.items()
    }
    own = {place.removeprefix("phases/0/"): part for place, part in parts.items()}
    optimizer = common.optimizer(
        "own_parts:optimizer",
        learning_rate=0.1,
        args={"momentum": 0.5} if whole else {},
        schedule=own["optimizer/schedule"],
    )
    first = common.phase(
        name="first",
        until={"steps": 3, "condition": own["until/condition"]},
        sampler=own["sampler"],
        teacher=own["teacher"],
        penalties=(own["penalties/0"],),
        projections=(own["projections/0"],),
        optimizer=optimizer,
        on_end=(
            named("canonicalize"),
            named("truncate", selector=own["on_end/1/args/selector"]),
        ),
    )
    last = phase(2, name="last", on_end=(named("merge"), own["phases/1/on_end/1"]))
    return support.make_config(first, last, model=own["model"], task=own["task"])


def at(config: Any, place: str) -> Any:
    for key in place.split("/"):
        config = config[int(key)] if isinstance(config, list) else config[key]
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> checkpoint.Saved:
    """A run of the config that gives no optional argument."""
    workdir = tmp_path_factory.mktemp("bare") / "run"
    return train(own_config(whole=False), workdir)


class TestDefaults:
    @pytest.mark.parametrize("place", [*OWN, "phases/0/optimizer"])
    def test_a_checkpoint_has_every_argument(self, finished, place):
        args = {"momentum": 0.5} if place.endswith("optimizer") else OWN[place][1]
        assert at(finished.metadata["config"], place)["args"] == args
        bare = at(own_config(whole=False), place)["args"]
        assert bare == {}  # the control: it was not given

    @pytest.mark.parametrize("first", [False, True], ids=["bare", "whole"])
    def test_with_and_without_them_is_one_run(self, finished, tmp_path, first):
        """Each resumes the other, in every bit."""
        interrupt(own_config(whole=first), tmp_path / "run", 2)
        saved = train(own_config(whole=not first), tmp_path / "run")
        assert saved.metadata["config"] == finished.metadata["config"]
        assert_same_checkpoints(saved, finished)

    @pytest.mark.parametrize("place", ["phases/0/sampler", "model", "task"])
    def test_another_value_is_another_run(self, finished, place):
        config = own_config(whole=True)
        (key,) = OWN[place][1]
        put(config, f"{place}/args/{key}", 0.25 if "sampler" in place else "other")
        workdir = finished.path.parent.parent
        with pytest.raises(UserError, match=f"same config.*\n.*{key}"):
            loop.train_and_evaluate(config, workdir)

    @pytest.mark.parametrize(
        "table, positional",
        [
            (MODELS, 0),
            (TASKS, 1),
            (samplers.SAMPLERS, 0),
            (teachers.TEACHERS, 0),
            (penalties.PENALTIES, 0),
            (projections.PROJECTIONS, 0),
            (until.CONDITIONS, 0),
            (actions.ACTIONS, 0),
            (TABLE, 1),
            (optim.SCHEDULES, 2),
        ],
        ids="models tasks samplers teachers penalties projections conditions actions"
        " selectors schedules".split(),
    )
    def test_none_of_ours_stays_hidden(self, table, positional):
        """Every default of every row can be written down."""
        for name in table:
            function = registry.resolve(name, table, allow_imports=None)
            options = [*inspect.signature(function).parameters.values()][positional:]
            hidden = {p.name for p in options if p.default is not p.empty}
            spec = registry.complete(named(name), table, positional=positional)
            assert spec["args"].keys() == hidden, name
