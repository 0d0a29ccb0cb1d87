"""Every config holds together and trains end to end, at toy size."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_jax import checkpoint
from train import checkpoints, checks, loop, opening, phases, sharding, tasks
from train import model as models
from train.config import to_json
from train.data import pipeline
from train.data.pixels import PIXELS
from train.run import Run
from train.stopping import StopRequest

FOLDER = Path(__file__).parents[1] / "configs"
SHARED = ("common", "sizes", "text")
"""Modules that are no configs themselves."""
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in SHARED)
TEXTS = ("multi30k", "shakespeare")
"""Configs on text; their smoke runs train the small model."""


def plain(name: str, arg: str) -> dict[str, Any]:
    module = importlib.import_module(f"configs.{name}")
    return to_json(module.get_config(arg))


def mnist_like() -> dict[str, dict[str, np.ndarray]]:
    """Noise of MNIST's shape: 40 images to train on, 10 to test on."""
    return _noise((28, 28, 1))


def cifar10_like() -> dict[str, dict[str, np.ndarray]]:
    return _noise((32, 32, 3))


def _noise(shape: tuple[int, ...], examples: int = 50) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *shape), dtype=np.uint8)
    arrays = {"image": images, "label": np.arange(examples) % 10}
    return {
        "train": {name: array[10:] for name, array in arrays.items()},
        "test": {name: array[:10] for name, array in arrays.items()},
    }


def write_texts(name: str, folder: Path) -> dict[str, Any]:
    """Writes a little text, in the form that a config's data set takes: 600 lines of
    words, each beside itself backwards where pairs are wanted."""
    rng = np.random.default_rng(0)
    words = np.asarray(["to", "be", "or", "not", "that", "is", "the", "question"])
    lines = [" ".join(rng.choice(words, 5)) for _ in range(600)]
    if name == "shakespeare":
        (folder / "all.txt").write_text("\n".join(lines))
        return {"text": {"file": str(folder / "all.txt")}}
    text = {}
    for split, part in (("train", 400), ("validation", 100), ("test", 100)):
        chosen, lines = lines[:part], lines[part:]
        files = [folder / f"{split}.{side}" for side in ("source", "target")]
        files[0].write_text("\n".join(chosen) + "\n")
        files[1].write_text("\n".join(line[::-1] for line in chosen) + "\n")
        text[split] = [str(file) for file in files]
    return {
        "text": text,
        "tokenizer": {"name": "byte_pairs", "args": {"vocab_size": 300}},
    }


QUICK = ("digits_mlp", "maestro", "shakespeare")
"""Configs of few phases, which train in every run of the tests; `slow` has them all."""

VARIANTS = [(name, "") for name in NAMES] + [
    ("bsr", "cifar10"),
    ("cuttlefish", "cifar10"),
    ("dense", "cifar10"),
    ("digits_vit", "dense"),
    ("fjord", "cifar10"),
    ("khodak", "cifar10"),
    ("khodak", "plain"),
    ("lorita", "cifar10,depth=3"),
    ("lorita", "depth=3"),
    ("maestro", "cifar10"),
    ("maestro", "cifar10,vgg"),
    ("maestro", "compare"),
    ("maestro", "dense"),
    ("nested", "alone=0.5"),
    ("nested", "parts"),
    ("nested", "compare"),
    ("nested", "halves,smallest=3"),
    ("nested", "masked"),
    ("pufferfish", "cifar10"),
    ("resnet8", "batch"),
    ("resnet8", "alone=0.5"),
    ("resnet8", "dense"),
    ("sequential_freezing", "cifar10"),
    ("svd_training", "cifar10"),
    ("svd_training", "cifar10,l1,spatial"),
    ("svd_training", "l1"),
    ("svd_training", "spatial"),
    *(
        (name, f"{size},{method}")
        for name, size in (("multi30k", "small"), ("shakespeare", "cpu"))
        for method in ("alone=0.5", "dense", "maestro")
    ),
    ("multi30k", "small"),
    ("multi30k", "small,energy"),
    ("shakespeare", "cpu"),
    ("shakespeare", "cpu,all"),
    ("shakespeare", "cpu,any,smallest=4"),
    ("shakespeare", "cpu,uniform"),
]


SHALLOWER = {
    ("resnet", 56): 20,
    ("resnet", 32): 20,
    ("vgg", 19): 11,
    **{("transformer", depth): 1 for depth in (4, 6)},
    **{("encoder_decoder", depth): 1 for depth in (3, 6)},
}
"""Depths of the same kind of blocks."""


def costly(name: str, arg: str) -> bool:
    """Whether to trace a variant takes long, and another one says nearly as much."""
    words = {name, *arg.split(",")}
    return not words.isdisjoint({"cifar10", "resnet8", "any", "all"})


def joined(*words: str) -> str:
    return ",".join(word for word in words if word)


@pytest.mark.parametrize("name, arg", VARIANTS)
def test_it_is_valid(name, arg):
    """Right keys, types and names; the smoke run is shorter and else the same."""
    config = plain(name, arg)
    built = phases.build_phases(config["phases"])
    assert [phase.name for phase in built] == [p["name"] for p in config["phases"]]
    smoke = plain(name, joined(arg, "smoke"))
    (_, end), (_, smoke_end) = (
        phases.spans(phases.build_phases(c["phases"]), steps_per_epoch=400)[-1]
        for c in (config, smoke)
    )
    assert smoke_end < end
    if name not in TEXTS or arg:
        assert smoke["model"] == config["model"]


@pytest.mark.parametrize(
    "name, arg",
    [
        pytest.param(*variant, marks=pytest.mark.slow if costly(*variant) else ())
        for variant in VARIANTS
    ],
)
def test_its_phases_fit_its_model(tmp_path, name, arg):
    """The check before the first step: every rule, sampler, penalty and action. Deep
    networks repeat their blocks: a shallower one is traced in less time."""
    config = plain(name, arg)
    model_args = config["model"]["args"]
    if "depth" in model_args:
        depth = model_args["depth"]
        model_args["depth"] = SHALLOWER.get((config["model"]["name"], depth), depth)
    if name in TEXTS:
        config["data"]["args"] |= write_texts(name, tmp_path)
        data = pipeline.load_data(config["data"], allow_imports=None)
    else:
        shapes = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "digits": (8, 8, 1)}
        size = {"shape": shapes[config["data"]["name"]], "examples": 600}
        data = pipeline.load_dataset(_noise, validation_examples=90, args=size)
    config = tasks.complete(config, data)
    task = models.build_task(config, data.facts, allow_imports=None)
    placement = sharding.make_placement(config["mesh"])
    run = Run(config, task, data, placement, StopRequest())
    model = models.abstract_model(run.build_model)
    checks.check_phases(run, phases.build_phases(config["phases"]), model)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(ValueError, match="config argument: .*'smok'"):
        plain(name, "smok")


def test_arguments_of_maestro():
    config = plain("maestro", "lasso=1e-4")
    (penalty,) = config["phases"][0]["penalties"]
    assert penalty["args"] == {"weight": 1e-4}
    dense = plain("maestro", "dense,smoke")
    assert dense["rank_rules"] == [[".*", "dense"]]
    assert dense["phases"][0]["penalties"] == []
    for key in ("optimizer", "teacher", "passes_loss"):  # the same recipe
        assert dense["phases"][0][key] == config["phases"][0][key]


@pytest.mark.parametrize("name", ["maestro", *TEXTS])
@pytest.mark.parametrize("weight", [0.0, 2e-4])
def test_a_lambda_is_the_one_that_is_given(name, weight):
    """Zero too, the control of a sweep."""
    config = plain(
        name, f"maestro,lasso={weight}" if name in TEXTS else f"lasso={weight}"
    )
    (penalty,) = config["phases"][-1]["penalties"]
    assert penalty["args"] == {"weight": weight}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "arg", ["dense,maestro", "alone=0.5,dense", "all,parts", "lasso=1e-4"]
)
def test_methods_that_exclude_each_other(name, arg):
    with pytest.raises(ValueError, match=f"config argument: .*'{arg}'"):
        plain(name, arg)


@pytest.mark.parametrize("arg", ["alone=0", "alone=1.5", "alone=nan"])
def test_a_size_that_is_none_is_refused(arg):
    with pytest.raises(ValueError, match=rf"alone must be in \(0, 1\], got '{arg}'"):
        plain("shakespeare", arg)


def test_byte_pairs_are_chosen_by_a_number():
    config = plain("shakespeare", "cpu,byte_pairs=512")
    chosen = {"name": "byte_pairs", "args": {"vocab_size": 512}}
    assert config["data"]["args"]["tokenizer"] == chosen


@pytest.mark.parametrize("name", NAMES)
def test_its_head_tells_how_to_run_it(name):
    """The command in the docstring names the file itself."""
    text = " ".join((FOLDER / f"{name}.py").read_text().split('"""')[1].split())
    command = f"python -m train.main --config=configs/{name}.py --workdir=runs/"
    assert f"Command: {command}" in text


@pytest.mark.parametrize(
    "name, arg",
    [
        pytest.param(name, arg, marks=() if name in QUICK else pytest.mark.slow)
        for name, arg in [
            *((name, "smoke") for name in NAMES),
            ("svd_training", "smoke,l1"),
        ]
    ],
)
def test_it_trains_end_to_end(tmp_path, name, arg):
    """Three steps of its smoke form, of each phase, one block deep, without MNIST; what
    comes out is low-rank, and is cut, saved, loaded and evaluated like any other."""
    config = plain(name, arg)
    config["model"]["args"] |= {"depth": 1} if name in ("digits_vit", *TEXTS) else {}
    data = config["data"]
    if name in TEXTS:
        data["args"] |= write_texts(name, tmp_path)
        data |= {"eval_batch_size": 10, "batch_size": 4}
    elif data["name"] != "digits":
        data["name"] = f"{__name__}:mnist_like"
        data |= {"validation_examples": 10, "eval_batch_size": 10, "batch_size": 8}
        data["train_examples"] = 0
        config["task"]["args"] |= {"mean": [33.3], "std": [78.6]}  # one channel
    else:
        data |= {"validation_examples": 1437 - 36, "batch_size": 12}
    for phase in config["phases"]:
        lengths = {"steps", "epochs", "to_epoch"}
        kept = {k: v for k, v in phase["until"].items() if k not in lengths}
        phase["until"] = {"steps": 3, **kept}
    config["eval_fractions"] = [1.0, 0.5]
    config["eval_every_steps"] = config["checkpoint_every_steps"] = 0
    steps = 3 * len(config["phases"])
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert result["step"] == steps
    assert [row["rank_fraction"] for row in result["frontier"]] == [1.0, 0.5]
    assert all(np.isfinite(row["loss"]) for row in result["frontier"])
    saved = checkpoint.open_checkpoint(tmp_path / "run")
    assert saved.step == steps
    written = saved.metadata["config"]
    config["model"]["args"] = written["model"]["args"] | config["model"]["args"]
    if config["task"]["name"] == "classification":
        config["task"]["args"] |= PIXELS.get(data["name"], {})
    assert written == json.loads(json.dumps(config))
    output, packages = tmp_path / "cut", [__name__.split(".")[0]]
    selector = {"name": "rank_fraction", "args": {"value": 0.5}}
    cut = checkpoints.truncate_checkpoint(
        tmp_path / "run", output, selector, allow_imports=packages
    )
    assert cut["ranks"] and cut["params"] < result["frontier"][0]["params"]
    figures = opening.open_model(output, allow_imports=packages).figures()
    assert figures["ranks"] == cut["ranks"] and np.isfinite(figures["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maestro", "svd_training", "khodak"])
def test_the_published_recipes_train(tmp_path, name):
    """One step of each phase on noise of CIFAR-10's shape."""
    config = plain(name, "cifar10,smoke")
    data = config["data"]
    data["name"] = f"{__name__}:cifar10_like"
    data |= {"validation_examples": 10, "eval_batch_size": 10, "batch_size": 10}
    for phase in config["phases"]:
        phase["until"] = {"steps": 1}
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert np.isfinite(result["frontier"][0]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_run_as_it_is(tmp_path, name):
    """On the real data; the network learns, and every phase is as long as it says."""
    config = plain(name, "smoke")
    try:
        pipeline.load_data(config["data"], allow_imports=None)
    except FileNotFoundError:
        pytest.skip(f"{config['data']['name']} is not in TFDS_DATA_DIR")
    result = loop.train_and_evaluate(config, tmp_path / "run")
    untrained = 1 / 10
    if name not in TEXTS:
        assert result["frontier"][0]["accuracy"] > 2 * untrained
    else:  # of a uniform guess
        facts = checkpoint.open_checkpoint(tmp_path / "run").metadata["facts"]
        assert result["frontier"][0]["loss"] < 0.8 * np.log(facts["vocab_size"])
    for row in result["frontier"]:
        assert np.isfinite(row["loss"])
