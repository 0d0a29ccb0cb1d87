"""A mistake in a config or workdir: one clear error before any work, nothing
changed."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from messages import check_form
from support import contents, put

from configs import common
from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from train import loop
from train.model import load_model


def make_config() -> dict[str, Any]:
    """A good config of one phase, as plain values."""
    phase = common.phase(
        name="only",
        until={"steps": 4},
        sampler={"name": "full", "args": {}},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
    )
    model = {"name": "mlp", "args": {"hidden": (4,)}}
    return support.make_config(phase, model=model, checkpoint_every_epochs=2, seed=0)


def named(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args}


BEAM = named("beam", measure="params", fraction=0.5, width=1, steps=2)
SHRINK = {"every_epochs": 1, "threshold": 1e-3, "multiple": 1}
RANKS = {"head": 4, "hidden/0": 4}

# what is wrong: place, value (or several of them), parts of the message
MISTAKES: dict[str, tuple[str | dict[str, Any], Any, tuple[str, ...]]] = {
    "unknown key": ("sede", 1, ("config: keys must be", "'sede'", "'seed'")),
    "unknown key of data": (
        "data/batchsize",
        1,
        ("config.data: keys must be", "'batchsize'", "'batch_size'"),
    ),
    "unknown key of a phase": (
        "phases/0/epochs",
        3,
        ("config.phases[0]: keys must be", "'epochs'"),
    ),
    "unknown key of an optimizer": (
        "phases/0/optimizer/momentum",
        0.9,
        ("config.phases[0].", "optimizer: keys must be", "'momentum'"),
    ),
    "unknown key of a schedule": (
        "phases/0/optimizer/schedule/warmup",
        1,
        ("config.phases[0].", "schedule: keys must be", "'warmup'"),
    ),
    "missing key": ("seed", ..., ("config: must have", "'seed'")),
    "missing key of a phase": (
        "phases/0/sampler",
        ...,
        ("config.phases[0]: must have", "'sampler'"),
    ),
    "text for a number": (
        "data/batch_size",
        "many",
        ("config.data.batch_size: must be of type int", "'many'"),
    ),
    "bool for a number": ("seed", True, ("config.seed: must be of type int", "True")),
    "number for a mapping": ("model", 3, ("config.model: must be a mapping", "3")),
    "phase that is no mapping": ("phases/0", 3, ("config.phases[0]: must be", "3")),
    "value that is no JSON": ("model/args/hidden", {1}, ("config: must hold JSON",)),
    "negative seed": ("seed", -1, ("seed", "-1")),
    "no batch": ("data/batch_size", 0, ("config.data.batch_size", "at least 1", "0")),
    "batch above the data": ("data/batch_size", 261, ("batch_size", "260", "261")),
    "too much validation": (
        "data/validation_examples",
        1437,
        ("validation_examples", "1436", "1437"),
    ),
    "never logged": ("log_every_steps", 0, ("config.log_every_steps", "got 0")),
    "negative epochs": ("eval_every_epochs", -1, ("config.eval_every_epochs", "-1")),
    "nothing kept": ("keep_checkpoints", 0, ("config.keep_checkpoints", "got 0")),
    "fraction of zero": ("eval_fractions", [1.0, 0], ("config.eval_fractions", "0]")),
    "fraction above one": ("eval_fractions", [1.5], ("config.eval_fractions", "1.5")),
    "fraction that is text": (
        "eval_fractions",
        ["1"],
        ("config.eval_fractions", "'1'"),
    ),
    "deviation of zero": ("task/args/std", [0.0], ("config.task: ", "[0.0]")),
    "deviation that is text": ("task/args/std", ["a"], ("config.task: ", "['a']")),
    "mean of three channels": (
        "task/args/mean",
        [1.0, 2.0, 3.0],
        ("config.task: ", "3.0"),
    ),
    "deviation of three channels": (
        "task/args/std",
        [1.0, 2.0, 3.0],
        ("config.task: ",),
    ),
    "mean that is text": ("task/args/mean", ["a"], ("config.task: ", "'a'")),
    "no phases": ("phases", [], ("config.phases: must hold at least one",)),
    "phase without length": (
        "phases/0/until",
        {},
        ("config.phases[0] (only)", "until", "{}"),
    ),
    "phase of two lengths": (
        "phases/0/until",
        {"steps": 3, "epochs": 1},
        (
            "config.phases[0] (only)",
            "until",
        ),
    ),
    "phase of no steps": ("phases/0/until", {"steps": 0}, ("(only): until", "0")),
    "phase of half a step": (
        "phases/0/until",
        {"steps": 0.5},
        ("(only): until", "0.5"),
    ),
    "passes_loss": ("phases/0/passes_loss", "max", ("(only): passes_loss", "'max'")),
    "incomplete shrink": (
        "phases/0/shrink",
        {"every_epochs": 1},
        ("config.phases[0] (only)", "shrink", "threshold"),
    ),
    "shrink never": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": 0},
        ("config.phases[0] (only)", "shrink", "at least 1"),
    ),
    "shrink of text": (
        "phases/0/shrink",
        {**SHRINK, "threshold": "small"},
        ("config.phases[0] (only)", "shrink", "'small'"),
    ),
    "shrink every half epoch": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": "1"},
        ("config.phases[0] (only)", "shrink", "'1'"),
    ),
    "rule that is no pair": ("rank_rules", [".*"], ("config.rank_rules", "'.*'")),
    "rule that matches nothing": (
        "rank_rules",
        [["haed", "dense"], ["hiden/.", "full"], [".*", "full"]],
        ("config.rank_rules", "'haed'", "'hiden/.'", "'hidden/0'"),
    ),
    "layers without a rule": (
        "rank_rules",
        [["no_such_layer|x", "full"]],
        ("config.rank_rules: every layer must be covered", "'head'", "'hidden/0'"),
    ),
    "rule that is no pattern": (
        "rank_rules",
        [["(", "full"]],
        ("config.rank_rules", "'('"),
    ),
    "unknown kind of rule": (
        "rank_rules",
        [[".*", "ful"]],
        ("config.rank_rules", "'ful'"),
    ),
    "negative rank": (
        "rank_rules",
        [[".*", {"max_rank": -1}]],
        ("config.rank_rules", "head", "hidden/0", "-1"),
    ),
    "half a rank": ("rank_rules", [[".*", {"max_rank": 2.5}]], ("rank_rules", "2.5")),
    "rank fraction of two": (
        "rank_rules",
        [[".*", {"rank_fraction": 2.0}]],
        ("config.rank_rules", "head", "2.0"),
    ),
    "unknown model": (
        "model/name",
        "mpl",
        ("config.model: name", "'mpl'", "mlp", "lenet", "convnet", "vit"),
    ),
    "model of no package": (
        "model/name",
        "no_such_package_h7:net",
        ("config.model: name", "no_such_package_h7"),
    ),
    "unknown argument of a model": (
        "model/args/hiden",
        [3],
        ("config.model: args", "'hiden'", "hidden"),
    ),
    "unknown sampler": (
        "phases/0/sampler/name",
        "sandwhich",
        (
            "config.phases[0] (only)",
            "sampler: name",
            "'sandwhich'",
            "sandwich",
            "single_layer",
        ),
    ),
    "unknown argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", pases=3),
        ("config.phases[0] (only)", "sampler: args", "'pases'", "'passes'"),
    ),
    "bad argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", passes=1),
        ("config.phases[0] (only)", "sampler", "passes must be at least 2", "1"),
    ),
    "missing argument of a sampler": (
        "phases/0/sampler",
        named("geometric"),
        ("config.phases[0] (only)", "sampler: args", "decay"),
    ),
    "bad fraction of a sampler": (
        "phases/0/sampler",
        named("uniform_fraction", fractions=[0.5, 1.5]),
        ("config.phases[0] (only)", "1.5"),
    ),
    "family of other layers": (
        "phases/0/sampler",
        named("family", profiles=[{"head": 2}]),
        ("config.phases[0] (only)", "family", "hidden/0"),
    ),
    "family above the rank": (
        "phases/0/sampler",
        named("family", profiles=[{**RANKS, "head": 9}]),
        ("config.phases[0] (only)", "head", "[0, 4]", "9"),
    ),
    "ranks of another batch": (
        "phases/0/sampler",
        named("per_example", batch_size=64),
        ("config.phases[0] (only)", "config.data.batch_size 65", "64"),
    ),
    "unknown teacher": (
        "phases/0/teacher/name",
        "me",
        ("config.phases[0] (only)", "teacher: name", "'me'", "full", "none"),
    ),
    "bad label weight": (
        "phases/0/teacher",
        named("full", target_weight=2.0),
        ("config.phases[0] (only)", "teacher", "target_weight", "2.0"),
    ),
    "unknown penalty": (
        "phases/0/penalties",
        [named("laso", weight=1.0)],
        ("config.phases[0] (only)", "penalties", "'laso'", "hierarchical_group_lasso"),
    ),
    "negative penalty": (
        "phases/0/penalties",
        [named("group_lasso", weight=-1.0)],
        ("(only)", "penalties", "-1.0"),
    ),
    "penalty without arguments": (
        "phases/0/penalties",
        [{"name": "group_lasso"}],
        ("config.phases[0] (only)", "penalties", "'args'"),
    ),
    "unknown optimizer": (
        "phases/0/optimizer/name",
        "sdg",
        ("config.phases[0] (only)", "optimizer: name", "'sdg'", "adamw", "sgd"),
    ),
    "unknown argument of an optimizer": (
        "phases/0/optimizer/args",
        {"momentun": 0.9},
        ("config.phases[0] (only)", "optimizer: args", "'momentun'", "'momentum'"),
    ),
    **{
        f"learning rate of {value}": (
            "phases/0/optimizer/learning_rate",
            value,
            ("config.phases[0] (only): optimizer: learning_rate: must be", str(value)),
        )
        for value in (-0.1, math.nan, math.inf)
    },
    "unknown schedule": (
        "phases/0/optimizer/schedule/name",
        "linear",
        ("config.phases[0] (only)", "schedule: name", "'linear'", "cosine"),
    ),
    "missing argument of a schedule": (
        "phases/0/optimizer/schedule",
        named("cosine", warmup_steps=1),
        ("config.phases[0] (only)", "schedule: args", "final_fraction"),
    ),
    "decayed that is no pattern": (
        "phases/0/optimizer/decayed",
        "(",
        ("config.phases[0] (only)", "optimizer: decayed", "'('"),
    ),
    "unknown augmentation": (
        "task/args/augment",
        [["random_crob", {"padding": 1}]],
        ("augment[0]", "'random_crob'", "random_crop", "random_flip"),
    ),
    "bad argument of an augmentation": (
        "task/args/augment",
        [["random_flip", {}], ["random_crop", {"padding": 0}]],
        ("augment[1]", "padding", "0"),
    ),
    "augmentation without mapping": (
        "task/args/augment",
        [["random_crop", 3]],
        ("augment", "random_crop", "3"),
    ),
    "data of no package": (
        "data/name",
        "no_such_package_h7:data",
        ("config.data: name", "no_such_package_h7"),
    ),
    "arguments for digits": ("data/args", {"size": 3}, ("digits", "'size'")),
    "name that is no data set": ("data/name", "../digits", ("data set", "'../digits'")),
}


# What phases can get wrong; the model is low-rank by "full", without `s`.

FIRST = "(only)"
KEPT = "config.phases[1] (only): optimizer_state"


def penalties(name: str, **args: Any) -> list[dict[str, Any]]:
    return [named(name, **args)]


def ends_with(name: str, **args: Any) -> list[dict[str, Any]]:
    return [named(name, **args)]


MISTAKES |= {
    "penalty on s without s": (
        "phases/0/penalties",
        penalties("hoyer", weight=0.1),
        (FIRST, "head", "with_s"),
    ),
    "target rank above the layer's": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks={"head": 5}),
        (FIRST, "head", "4", "5"),
    ),
    "target ranks of another layer": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks={"had": 2}),
        (FIRST, "had", "hidden/0"),
    ),
    "targets that nobody selects": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks="selected"),
        ("(only)", "penalties", "'selected'", "'select'"),
    ),
    "unknown projection": (
        "phases/0/projections",
        penalties("spectral_norm"),
        ("config.phases[0] (only)", "projections: name", "stable_rank_normalization"),
    ),
    "unknown condition": (
        "phases/0/until",
        {"steps": 4, "condition": named("bored")},
        ("until: name", "stable_ranks_stand_still", "'bored'"),
    ),
    "arguments of a condition": (
        "phases/0/until",
        {"steps": 4, "condition": named("stable_ranks_stand_still", every_steps=0)},
        ("until", "every_steps", "0"),
    ),
    "a condition without a limit": (
        "phases/0/until",
        {"condition": named("stable_ranks_stand_still", every_steps=1)},
        ("(only): until", "'steps'"),
    ),
    "to an epoch that is over": (
        "phases/1/until",
        {"to_epoch": 1},
        ("(only)", "until", "step 4", "Raise it"),
    ),
    "another optimizer that is kept": (
        {"phases/1/optimizer_state": "kept", "phases/1/optimizer/clip_norm": 1.0},
        None,
        (KEPT, "'kept'", "clip_norm"),
    ),
    "a state that is kept from nothing": (
        "phases/0/optimizer_state",
        "kept",
        ("config.phases[0] (only)", "optimizer_state", "'new'"),
    ),
    "an optimizer state of another word": (
        "phases/0/optimizer_state",
        "old",
        ("(only): optimizer_state", "('new', 'kept')", "'old'"),
    ),
    "no parameter to train": (
        "phases/0/trainable",
        ["kernel"],
        (FIRST, "trainable", "'kernel'", "head/factors/u"),
    ),
    "a pattern that is none": (
        "phases/0/trainable",
        ["("],
        ("config.phases[0] (only)", "trainable", "regular expression", "'('"),
    ),
    "nothing to train": ("phases/0/trainable", [], ("(only): trainable", "[]")),
    "unknown action": (
        "phases/0/on_end",
        ends_with("distil"),
        ("config.phases[0] (only)", "on_end: name", "canonicalize", "'distil'"),
    ),
    "rules of an action without a layer": (
        "phases/0/on_end",
        [named("merge"), named("factorize", rules=[["bod", "full"], [".*", "dense"]])],
        (FIRST, "on_end (factorize)", "'bod'", "hidden/0"),
    ),
    "share of energy of an action": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("energy", value=1.5)),
        (FIRST, "on_end (truncate)", "energy", "1.5"),
    ),
    "rank file of an action": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("ranks", value={"head": 9})),
        (FIRST, "on_end (truncate)", "head", "4", "9"),
    ),
    "unknown selector": (
        "phases/0/on_end",
        ends_with("select", selector=named("best")),
        (FIRST, "on_end", "beam", "'best'"),
    ),
    "a selector that is no mapping": (
        "phases/0/on_end",
        ends_with("select", selector="beam"),
        (FIRST, "on_end", "'name' and 'args'"),
    ),
    "a budget below rank 1": (
        "phases/0/on_end",
        ends_with("select", selector=named("macs_fraction", value=0.01)),
        (FIRST, "on_end (select)", "macs_fraction", "0.01"),
    ),
    "ranks that nobody selected": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("selected")),
        (FIRST, "on_end (truncate)", "'select'"),
    ),
    "a search without held-out images": (
        {
            "phases/0/on_end": ends_with("select", selector=BEAM),
            "data/validation_examples": 0,
        },
        None,
        (FIRST, "on_end (select)", "beam", "held-out training data"),
    ),
    "a sampler for a dense model": (
        {
            "phases/0/sampler": named("sandwich", passes=3),
            "rank_rules": [[".*", "dense"]],
        },
        None,
        (FIRST, "sampler", "dense model", "'full'"),
    ),
    "a rank per example between three factors": (
        {
            "phases/0/sampler": named("per_example", batch_size=65),
            "rank_rules": [[".*", {"depth": 3}]],
        },
        None,
        (FIRST, "per example", "canonicalize"),
    ),
    "a sampler without layers to sample": (
        {"phases/0/sampler": named("single_layer"), "rank_rules": [[".*", "dense"]]},
        None,
        (FIRST, "sampler", "dense model"),
    ),
    "a penalty on a dense model": (
        {
            "phases/0/penalties": penalties("group_lasso", weight=0.1),
            "rank_rules": [[".*", "dense"]],
        },
        None,
        (FIRST, "penalties", "dense model"),
    ),
    "a projection beside a factor at rest": (
        {
            "phases/0/projections": penalties(
                "stable_rank_normalization", stable_rank=2.0
            ),
            "phases/0/trainable": [".*/u"],
        },
        None,
        (FIRST, "trainable", "projections"),
    ),
    "decay of nothing": (
        {
            "phases/0/optimizer/weight_decay": 0.1,
            "phases/0/optimizer/decayed": "kernel",
        },
        None,
        (FIRST, "optimizer.decayed", "'kernel'", "head/factors/u"),
    ),
    "a stable rank of another fold": (
        {
            "phases/0/on_end": [
                named("factorize_at_stable_rank", rules=[[".*", {"scheme": 2}]])
            ],
            "rank_rules": [[".*", "dense"]],
        },
        None,
        ("config.phases[0] (only)", "on_end", "scheme"),
    ),
    "a stable rank of what is low-rank": (
        "phases/0/on_end",
        ends_with("factorize_at_stable_rank", rules=[[".*", "full"]]),
        (FIRST, "on_end (factorize_at_stable_rank)", "dense model", "hidden/0"),
    ),
    "s in a deep product": (
        "rank_rules",
        [[".*", {"depth": 3, "with_s": True}]],
        ("config.rank_rules", "head", "depth", "with_s"),
    ),
    "a scheme of a linear layer": (
        "rank_rules",
        [[".*", {"scheme": 2}]],
        ("config.rank_rules", "head", "scheme is for convolutions"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config(tmp_path, mistake):
    """The message names place and value; no workdir is left behind."""
    place, value, expected = MISTAKES[mistake]
    config = make_config()
    for where, what in (place if isinstance(place, dict) else {place: value}).items():
        if where.startswith("phases/1") and len(config["phases"]) == 1:
            config["phases"] += make_config()["phases"]
        put(config, where, what)
    with pytest.raises(ValueError) as caught:
        loop.train_and_evaluate(config, tmp_path / "run")
    message = str(caught.value)
    for part in expected:
        assert part in message
    check_form(message)
    assert not list(tmp_path.iterdir())


def test_all_mistakes_of_a_kind_at_once(tmp_path):
    config = make_config()
    put(config, "sede", 1)
    put(config, "data/batch_size", ...)
    put(config, "model/name", 3)
    with pytest.raises(ValueError) as caught:
        loop.train_and_evaluate(config, tmp_path / "run")
    missing = "config.data: must have ['batch_size']"
    for part in ("'sede'", missing, "config.model.name"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "no_such_set"])
def test_data_that_is_not_there(tmp_path, name):
    """The message says where it was looked for and how to prepare it."""
    config, folder = make_config(), tmp_path / "data"
    put(config, "data/name", name)
    put(config, "data/data_dir", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        loop.train_and_evaluate(config, tmp_path / "run")
    for part in (f"'{name}'", str(folder), "download_and_prepare()", "TFDS_DATA_DIR"):
        assert part in str(caught.value)
    check_form(str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_init_from_nothing(tmp_path, path):
    (tmp_path / "empty").mkdir()
    config = make_config()
    put(config, "init_from", str(tmp_path / path))
    with pytest.raises(FileNotFoundError, match="config.init_from: must .*" + path):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_is_not_finite(tmp_path):
    """Found when it is factored, before the run has a folder."""
    source, config = tmp_path / "dense", make_config()
    put(config, "rank_rules", [[".*", "dense"]])
    loop.train_and_evaluate(config, source)
    saved = checkpoint.open_checkpoint(source)
    model = load_model(saved, allow_imports=None)
    model.head.kernel[...] = model.head.kernel[...].at[0, 0].set(float("nan"))
    metadata = {key: saved.metadata[key] for key in ("config", "facts")}
    checkpoint.save(tmp_path / "broken", model, metadata=metadata)
    config = make_config()
    put(config, "init_from", str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="rank_rules: head: .*NaN"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Workdirs that are there already.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the good config."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    loop.train_and_evaluate(make_config(), workdir)
    return workdir


def test_a_run_of_another_config(finished):
    """Every difference is listed, with both values; the run stays as it is."""
    before, config = contents(finished), make_config()
    put(config, "seed", 1)
    put(config, "model/args/hidden", [5])
    put(config, "phases/0/optimizer/learning_rate", 0.2)
    with pytest.raises(ValueError) as caught:
        loop.train_and_evaluate(config, finished)
    message = str(caught.value)
    for part in ("--workdir", "config.seed: 0 there, 1 here", "[4] there, [5] here"):
        assert part in message
    assert "learning_rate" in message and "0.1" in message and "0.2" in message
    assert "batch_size" not in message  # what does not differ
    assert contents(finished) == before


def test_a_workdir_that_cannot_be_written(tmp_path):
    """Before the data are read: these are not there."""
    if not Path("/proc").is_dir():
        pytest.skip("only on Linux")
    config = make_config()
    put(config, "data/name", "no_such_package_h7:data")
    with pytest.raises(UserError, match="--workdir: must be a place that can be wri"):
        loop.train_and_evaluate(config, Path("/proc/run"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_text("mine"), "must be in a folder"),
        (lambda path: (path.mkdir(), (path / "a").write_text("mine")), "other files"),
    ],
    ids=["a file", "foreign files"],
)
def test_a_workdir_that_is_taken(tmp_path, make: Callable[[Path], Any], message: str):
    path = tmp_path / "run"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"--workdir.*{message}"):
        loop.train_and_evaluate(make_config(), path)
    assert contents(tmp_path) == before


def damaged_copy(finished: Path, target: Path, step: int) -> Path:
    """A run whose only complete checkpoint is 4, with a half-written one beside it."""
    shutil.copytree(finished, target)
    half = target / "checkpoints" / str(step)
    shutil.copytree(target / "checkpoints/4", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(half / "params")
    return target


def test_a_half_written_checkpoint_alone(finished, tmp_path):
    """Named as such; nothing is deleted."""
    workdir = damaged_copy(finished, tmp_path / "run", 2)
    shutil.rmtree(workdir / "checkpoints/4")
    before = contents(workdir)
    with pytest.raises(FileNotFoundError, match="--workdir: .*complete.*half-written"):
        loop.train_and_evaluate(make_config(), workdir)
    assert contents(workdir) == before


def test_a_half_written_checkpoint_beside_a_complete_one(finished, tmp_path):
    """The complete one counts, and the run goes on and saves over the other."""
    workdir = damaged_copy(finished, tmp_path / "run", 5)
    assert checkpoint.open_checkpoint(workdir).step == 4
    result = loop.train_and_evaluate(make_config(), workdir)
    assert result["step"] == 4
    with pytest.raises(FileNotFoundError, match="half-written"):
        checkpoint.open_checkpoint(workdir / "checkpoints/5")
