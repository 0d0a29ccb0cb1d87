"""A mistake in a config or workdir: one clear error before any work, nothing
changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import common
from lowrank_jax import checkpoint
from train import train as train_lib


def make_config() -> dict[str, Any]:
    """A good config of one phase, as plain values."""
    config = common.base(seed=0)
    config.data = common.digits(batch_size=65)
    config.data.validation_examples = 1177
    config.model = {"name": "mlp", "args": {"hidden": (4,)}}
    phase = common.phase(
        name="only",
        until={"steps": 4},
        sampler={"name": "full", "args": {}},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
    )
    config.phases = (phase,)
    config.eval_every_epochs = 0
    config.checkpoint_every_epochs = 2
    return json.loads(json.dumps(config.to_dict()))


def put(config: dict[str, Any], place: str, value: Any) -> None:
    """Sets `place`, such as "phases/0/until"; deletes it if the value is `...`."""
    *parents, last = place.split("/")
    node = config
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    key = int(last) if isinstance(node, list) else last
    if value is ...:
        del node[key]
    else:
        node[key] = value


def named(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args}


SHRINK = {"every_epochs": 1, "threshold": 1e-3, "multiple": 1}
RANKS = {"head": 4, "hidden/0": 4}

# what is wrong: place, value, parts of the message
MISTAKES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
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
        ("config.phases[0].optimizer: keys must be", "'momentum'"),
    ),
    "unknown key of a schedule": (
        "phases/0/optimizer/schedule/warmup",
        1,
        ("config.phases[0].optimizer.schedule: keys must be", "'warmup'"),
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
    "deviation of zero": ("data/std", [0.0], ("config.data.std", "[0.0]")),
    "deviation that is text": ("data/std", ["a"], ("config.data.std", "['a']")),
    "mean of three channels": (
        "data/mean",
        [1.0, 2.0, 3.0],
        ("config.data.mean", "3.0"),
    ),
    "deviation of three channels": ("data/std", [1.0, 2.0, 3.0], ("config.data.std",)),
    "mean that is text": ("data/mean", ["a"], ("config.data.mean", "'a'")),
    "no phases": ("phases", [], ("config.phases: must hold at least one",)),
    "phase without length": (
        "phases/0/until",
        {},
        ("config.phases[0] (only).until", "{}"),
    ),
    "phase of two lengths": (
        "phases/0/until",
        {"steps": 3, "epochs": 1},
        ("config.phases[0] (only).until",),
    ),
    "phase of no steps": ("phases/0/until", {"steps": 0}, ("(only).until", "0")),
    "phase of half a step": ("phases/0/until", {"steps": 0.5}, ("(only).until", "0.5")),
    "passes_loss": ("phases/0/passes_loss", "max", ("(only).passes_loss", "'max'")),
    "incomplete shrink": (
        "phases/0/shrink",
        {"every_epochs": 1},
        ("config.phases[0] (only).shrink", "threshold"),
    ),
    "shrink never": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": 0},
        ("config.phases[0] (only).shrink", "at least 1"),
    ),
    "shrink of text": (
        "phases/0/shrink",
        {**SHRINK, "threshold": "small"},
        ("config.phases[0] (only).shrink", "'small'"),
    ),
    "shrink every half epoch": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": "1"},
        ("config.phases[0] (only).shrink", "'1'"),
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
        ("config.model.name", "'mpl'", "mlp", "lenet", "convnet", "vit"),
    ),
    "model of no package": (
        "model/name",
        "no_such_package_h7:net",
        ("config.model.name", "no_such_package_h7"),
    ),
    "unknown argument of a model": (
        "model/args/hiden",
        [3],
        ("config.model.args", "'hiden'", "hidden"),
    ),
    "unknown sampler": (
        "phases/0/sampler/name",
        "sandwhich",
        ("config.phases[0].sampler.name", "'sandwhich'", "sandwich", "single_layer"),
    ),
    "unknown argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", pases=3),
        ("config.phases[0].sampler.args", "'pases'", "'passes'"),
    ),
    "bad argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", passes=1),
        ("config.phases[0].sampler", "passes must be at least 2", "1"),
    ),
    "missing argument of a sampler": (
        "phases/0/sampler",
        named("geometric"),
        ("config.phases[0].sampler.args", "decay"),
    ),
    "bad fraction of a sampler": (
        "phases/0/sampler",
        named("uniform_fraction", fractions=[0.5, 1.5]),
        ("config.phases (only)", "1.5"),
    ),
    "family of other layers": (
        "phases/0/sampler",
        named("family", profiles=[{"head": 2}]),
        ("config.phases (only)", "family", "hidden/0"),
    ),
    "family above the rank": (
        "phases/0/sampler",
        named("family", profiles=[{**RANKS, "head": 9}]),
        ("config.phases (only)", "head", "[0, 4]", "9"),
    ),
    "ranks of another batch": (
        "phases/0/sampler",
        named("per_example", batch_size=64),
        ("config.phases (only)", "config.data.batch_size 65", "64"),
    ),
    "unknown teacher": (
        "phases/0/teacher/name",
        "me",
        ("config.phases[0].teacher.name", "'me'", "full", "none"),
    ),
    "bad label weight": (
        "phases/0/teacher",
        named("full", label_weight=2.0),
        ("config.phases[0].teacher", "label_weight", "2.0"),
    ),
    "unknown penalty": (
        "phases/0/penalties",
        [named("laso", weight=1.0)],
        ("config.phases[0].penalties", "'laso'", "hierarchical_group_lasso"),
    ),
    "negative penalty": (
        "phases/0/penalties",
        [named("group_lasso", weight=-1.0)],
        ("config.phases[0].penalties", "-1.0"),
    ),
    "penalty without arguments": (
        "phases/0/penalties",
        [{"name": "group_lasso"}],
        ("config.phases[0] (only).penalties", "'args'"),
    ),
    "unknown optimizer": (
        "phases/0/optimizer/name",
        "sdg",
        ("config.phases[0].optimizer.name", "'sdg'", "adamw", "sgd"),
    ),
    "unknown argument of an optimizer": (
        "phases/0/optimizer/args",
        {"momentun": 0.9},
        ("config.phases[0].optimizer.args", "'momentun'", "'momentum'"),
    ),
    "unknown schedule": (
        "phases/0/optimizer/schedule/name",
        "linear",
        ("config.phases[0].optimizer.schedule.name", "'linear'", "cosine"),
    ),
    "missing argument of a schedule": (
        "phases/0/optimizer/schedule",
        named("cosine", warmup_steps=1),
        ("config.phases[0].optimizer.schedule.args", "final_fraction"),
    ),
    "decayed that is no pattern": (
        "phases/0/optimizer/decayed",
        "(",
        ("config.phases[0].optimizer.decayed", "'('"),
    ),
    "unknown augmentation": (
        "data/augment",
        [["random_crob", {"padding": 1}]],
        ("augment[0]", "'random_crob'", "random_crop", "random_flip"),
    ),
    "bad argument of an augmentation": (
        "data/augment",
        [["random_flip", {}], ["random_crop", {"padding": 0}]],
        ("augment[1]", "padding", "0"),
    ),
    "augmentation without mapping": (
        "data/augment",
        [["random_crop", 3]],
        ("augment", "random_crop", "3"),
    ),
    "data of no package": (
        "data/name",
        "no_such_package_h7:data",
        ("config.data.name", "no_such_package_h7"),
    ),
    "arguments for digits": ("data/args", {"size": 3}, ("digits", "'size'")),
    "name that is no data set": ("data/name", "../digits", ("data set", "'../digits'")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config(tmp_path, mistake):
    """The message names place and value; no workdir is left behind."""
    place, value, expected = MISTAKES[mistake]
    config = make_config()
    put(config, place, value)
    with pytest.raises(ValueError) as caught:
        train_lib.train_and_evaluate(config, tmp_path / "run")
    for part in expected:
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_all_mistakes_of_a_kind_at_once(tmp_path):
    config = make_config()
    put(config, "sede", 1)
    put(config, "data/std", ...)
    put(config, "model/name", 3)
    with pytest.raises(ValueError) as caught:
        train_lib.train_and_evaluate(config, tmp_path / "run")
    for part in ("'sede'", "config.data: must have ['std']", "config.model.name"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "no_such_set"])
def test_data_that_is_not_there(tmp_path, name):
    """The message says where it was looked for and how to prepare it."""
    config, folder = make_config(), tmp_path / "data"
    put(config, "data/name", name)
    put(config, "data/data_dir", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        train_lib.train_and_evaluate(config, tmp_path / "run")
    for part in (f"'{name}'", str(folder), "download_and_prepare()", "TFDS_DATA_DIR"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_init_from_nothing(tmp_path, path):
    (tmp_path / "empty").mkdir()
    config = make_config()
    put(config, "init_from", str(tmp_path / path))
    with pytest.raises(FileNotFoundError, match="config.init_from: must .*" + path):
        train_lib.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Workdirs that are there already.


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the good config."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train_lib.train_and_evaluate(make_config(), workdir)
    return workdir


def test_a_run_of_another_config(finished):
    """Every difference is listed, with both values; the run stays as it is."""
    before, config = contents(finished), make_config()
    put(config, "seed", 1)
    put(config, "model/args/hidden", [5])
    put(config, "phases/0/optimizer/learning_rate", 0.2)
    with pytest.raises(ValueError) as caught:
        train_lib.train_and_evaluate(config, finished)
    message = str(caught.value)
    for part in ("--workdir", "config.seed: 0 there, 1 here", "[4] there, [5] here"):
        assert part in message
    assert "learning_rate" in message and "0.1" in message and "0.2" in message
    assert "batch_size" not in message  # what does not differ
    assert contents(finished) == before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_text("mine"), "must be a folder"),
        (lambda path: (path.mkdir(), (path / "a").write_text("mine")), "other files"),
    ],
    ids=["a file", "foreign files"],
)
def test_a_workdir_that_is_taken(tmp_path, make: Callable[[Path], Any], message: str):
    path = tmp_path / "run"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"--workdir.*{message}"):
        train_lib.train_and_evaluate(make_config(), path)
    assert contents(tmp_path) == before


def damaged_copy(finished: Path, target: Path, step: int) -> Path:
    """A run whose only complete checkpoint is 4, with a half-written one beside it."""
    import shutil

    shutil.copytree(finished, target)
    half = target / "checkpoints" / str(step)
    shutil.copytree(target / "checkpoints/4", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(half / "params")
    return target


def test_a_half_written_checkpoint_alone(finished, tmp_path):
    """Named as such; nothing is deleted."""
    workdir = damaged_copy(finished, tmp_path / "run", 2)
    import shutil

    shutil.rmtree(workdir / "checkpoints/4")
    before = contents(workdir)
    with pytest.raises(FileNotFoundError, match="--workdir: .*complete.*half-written"):
        train_lib.train_and_evaluate(make_config(), workdir)
    assert contents(workdir) == before


def test_a_half_written_checkpoint_beside_a_complete_one(finished, tmp_path):
    """The complete one counts, and the run goes on and saves over the other."""
    workdir = damaged_copy(finished, tmp_path / "run", 5)
    assert checkpoint.open_checkpoint(workdir).step == 4
    result = train_lib.train_and_evaluate(make_config(), workdir)
    assert result["step"] == 4
    with pytest.raises(FileNotFoundError, match="half-written"):
        checkpoint.open_checkpoint(workdir / "checkpoints/5")
