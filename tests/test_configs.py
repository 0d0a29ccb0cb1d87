"""Every config holds together and trains end to end, at toy size."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lowrank_jax import checkpoint
from train import config as config_lib
from train import phases
from train import train as train_lib

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "common")


def plain(name: str, arg: str) -> dict[str, Any]:
    module = importlib.import_module(f"configs.{name}")
    return config_lib.to_json(module.get_config(arg))


def mnist_like() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Noise of MNIST's shape: 40 images to train on, 10 to test on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)
    labels = np.arange(50) % 10
    return {"train": (images[:40], labels[:40]), "test": (images[40:], labels[40:])}


def test_there_are_configs():
    expected = {"digits_mlp", "digits_vit", "mnist_lenet_maestro", "mnist_lenet_nested"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid(name, arg):
    """Right keys, types and names; the smoke run is shorter and else the same."""
    config = plain(name, arg)
    built = phases.build_phases(config, steps_per_epoch=100)
    assert [phase.name for phase in built] == [p["name"] for p in config["phases"]]
    whole = phases.build_phases(plain(name, ""), steps_per_epoch=100)
    assert built[-1].end < whole[-1].end or arg == ""
    assert config["model"] == plain(name, "")["model"]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(ValueError, match="config argument: .*'smok'"):
        plain(name, "smok")


def test_arguments_of_maestro():
    config = plain("mnist_lenet_maestro", "lasso=1e-4")
    (penalty,) = config["phases"][0]["penalties"]
    assert penalty["args"] == {"weight": 1e-4}
    dense = plain("mnist_lenet_maestro", "dense,smoke")
    assert dense["rank_rules"] == [[".*", "dense"]]
    assert dense["phases"][0]["penalties"] == []
    for key in ("optimizer", "teacher", "passes_loss"):  # the same recipe
        assert dense["phases"][0][key] == config["phases"][0][key]


@pytest.mark.parametrize("name", NAMES)
def test_its_head_tells_how_to_run_it(name):
    """The command in the docstring names the file itself."""
    text = " ".join((FOLDER / f"{name}.py").read_text().split('"""')[1].split())
    command = f"python -m train.main --config=configs/{name}.py --workdir=runs/"
    assert f"Command: {command}" in text


@pytest.fixture
def quick_compilation():
    """Three steps need no fast code: XLA's optimizations are most of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(
    "name, arg",
    [(name, "smoke") for name in NAMES] + [("mnist_lenet_maestro", "smoke,dense")],
)
def test_it_trains_end_to_end(quick_compilation, tmp_path, name, arg):
    """Three steps of its smoke form, of each phase, one block deep, without MNIST."""
    config = plain(name, arg)
    config["model"]["args"] |= {"depth": 1} if name == "digits_vit" else {}
    data = config["data"]
    if data["name"] != "digits":
        data["name"] = f"{__name__}:mnist_like"
        data |= {"validation_examples": 10, "eval_batch_size": 10, "batch_size": 10}
    else:
        data |= {"validation_examples": 1437 - 30, "batch_size": 10}
    for phase in config["phases"]:
        phase["until"] = {"steps": 3}
    config["eval_fractions"] = [1.0, 0.5]
    steps = 3 * len(config["phases"])
    result = train_lib.train_and_evaluate(config, tmp_path / "run")
    assert result["step"] == steps
    assert [row["rank_fraction"] for row in result["frontier"]] == [1.0, 0.5]
    assert all(np.isfinite(row["loss"]) for row in result["frontier"])
    saved = checkpoint.open_checkpoint(tmp_path / "run")
    assert saved.step == steps
    assert saved.metadata["config"] == json.loads(json.dumps(config))
