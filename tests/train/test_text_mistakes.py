"""What a run on text refuses, before any work, naming the place."""

from pathlib import Path

import pytest
from flax import nnx
from messages import check_form
from support import interrupt, put
from text_configs import make_config, write

from configs import digits_mlp
from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from train import loop, opening, writing
from train.config import to_json
from train.run import open_run


def save(config: dict, folder: Path) -> Path:
    """A checkpoint of the untrained model."""
    run = open_run(config)
    checkpoint.save(folder, run.build_model(), metadata=run.metadata())
    return folder


def refused(config: dict, workdir: Path) -> str:
    with pytest.raises(UserError) as caught:
        loop.train_and_evaluate(config, workdir)
    assert not workdir.exists()
    check_form(str(caught.value))
    return str(caught.value)


def test_a_checkpoint_with_another_tokenizer(tmp_path):
    theirs = save(make_config(write(tmp_path / "a.txt")), tmp_path / "theirs")
    config = make_config(write(tmp_path / "b.txt", "xyz \n"))
    put(config, "init_from", str(theirs))
    message = refused(config, tmp_path / "run")
    for part in ("config.init_from: ", "tokenizer.characters", "abc", "xyz"):
        assert part in message


def test_a_checkpoint_of_another_task(tmp_path):
    theirs = save(make_config(write(tmp_path / "a.txt")), tmp_path / "theirs")
    config = to_json(digits_mlp.get_config("smoke"))
    put(config, "init_from", str(theirs))
    message = refused(config, tmp_path / "run")
    for part in ("config.init_from: ", "'language_model'", "'classification'"):
        assert part in message


def test_a_checkpoint_whose_text_has_changed_since(tmp_path):
    """It is not judged with other numbers for its characters."""
    file = write(tmp_path / "a.txt")
    folder = save(make_config(file), tmp_path / "theirs")
    assert opening.open_model(folder).figures()["loss"] > 0
    write(file, "xyz \n")
    with pytest.raises(UserError, match="tokenizer.characters: .*abc.* there, .*xyz"):
        opening.open_model(folder)


def test_a_run_whose_text_has_changed_since(tmp_path):
    """It does not go on with other numbers for its characters; nothing is lost."""
    file = write(tmp_path / "a.txt")
    config = make_config(file)
    for phase in config["phases"]:
        phase["until"] = {"steps": 2}
    interrupt(config, tmp_path / "run", 1)
    write(file, "xyz \n")
    with pytest.raises(UserError, match="tokenizer.characters: .*abc.* there, .*xyz"):
        loop.train_and_evaluate(config, tmp_path / "run")
    write(file)
    assert loop.train_and_evaluate(config, tmp_path / "run")["step"] == 4


def test_a_run_whose_text_has_other_words_since(tmp_path):
    """The same characters in another order are another text."""
    file = write(tmp_path / "a.txt")
    config = make_config(file)
    interrupt(config, tmp_path / "run", 1)
    text = file.read_text()
    write(file, text[::-1])
    with pytest.raises(UserError, match="about.digests.train: "):
        loop.train_and_evaluate(config, tmp_path / "run")


def test_a_model_goes_on_from_another_text(tmp_path):
    """With the same characters: that is fine-tuning."""
    theirs = save(make_config(write(tmp_path / "a.txt")), tmp_path / "theirs")
    config = make_config(write(tmp_path / "b.txt", "c ba\n"))
    put(config, "init_from", str(theirs))
    for phase in config["phases"]:
        phase["until"] = {"steps": 1}
    assert loop.train_and_evaluate(config, tmp_path / "run")["step"] == 2


def bag_of_tokens(*, vocab_size: int, context: int, rngs: nnx.Rngs) -> nnx.Module:
    """A model of someone's own that trains, and has no way to write."""
    del context
    return nnx.Sequential(
        nnx.Embed(vocab_size, 4, rngs=rngs), nnx.Linear(4, vocab_size, rngs=rngs)
    )


def test_a_model_that_does_not_decode_writes_no_text(tmp_path):
    config = make_config(write(tmp_path / "a.txt"))
    config["model"] = {"name": f"{__name__}:bag_of_tokens", "args": {}}
    folder = save(config, tmp_path / "own")
    with pytest.raises(UserError) as caught:
        writing.open_writer(folder, allow_imports=[__name__.partition(".")[0]])
    for part in ("--checkpoint: ", "Sequential without init_cache, decode"):
        assert part in str(caught.value)
    check_form(str(caught.value))


MISTAKES = {
    "no such tokenizer": (
        "data/args/tokenizer",
        {"name": "words", "args": {}},
        ("config.data: ", "characters", "'words'"),
    ),
    "a context longer than the text": (
        "data/args/context",
        4000,
        ("config.data: ", "validation", "4,001", "200"),
    ),
    "a validation split besides its own": (
        "data/validation_examples",
        10,
        ("config.data: ", "validation_examples", "10"),
    ),
    "no such file": ("data/args/text", {"file": "/nowhere"}, ("/nowhere",)),
    "the task of translation": (
        "task",
        {"name": "translation", "args": {}},
        ("config.task: ", "'source'", "'target_segment'", "'label'"),
    ),
    "a model of images": (
        "model",
        {"name": "vit", "args": {}},
        ("config.model: ", "image_shape"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_config_on_text(tmp_path, mistake):
    config = make_config(write(tmp_path / "a.txt"))
    place, value, parts = MISTAKES[mistake]
    put(config, place, value)
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        loop.train_and_evaluate(config, tmp_path / "run")
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_utf_8(tmp_path):
    file = write(tmp_path / "a.txt")
    file.write_bytes(file.read_bytes()[:100] + b"\xff" + file.read_bytes()[100:])
    message = refused(make_config(file), tmp_path / "run")
    for part in ("config.data: ", str(file), "UTF-8", "100"):
        assert part in message


def test_a_character_that_only_the_test_split_holds(tmp_path):
    file = write(tmp_path / "a.txt")
    file.write_text(file.read_text() + "Q")
    message = refused(make_config(file), tmp_path / "run")
    for part in ("config.data: ", "test", "'Q'"):
        assert part in message
