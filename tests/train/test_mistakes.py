"""A mistake in a config: one clear error before any work, no workdir left behind."""

import config_mistakes
import phase_mistakes
import pytest
from config_mistakes import make_config
from messages import check_form
from support import put

from lowrank_jax import checkpoint
from train import loop
from train.model import load_model

MISTAKES = config_mistakes.MISTAKES | phase_mistakes.MISTAKES


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
    """The message says where it was looked for and how to get it."""
    config, folder = make_config(), tmp_path / "data"
    put(config, "data/name", name)
    put(config, "data/data_dir", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        loop.train_and_evaluate(config, tmp_path / "run")
    fix = "train.fetch mnist" if name == "mnist" else "download_and_prepare()"
    for part in (f"'{name}'", str(folder), fix, "TFDS_DATA_DIR"):
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
