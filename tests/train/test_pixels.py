"""What images are normalized by follows the data set; what a config says stays."""

import numpy as np
import pytest
import support

from configs import common
from train import config as config_lib
from train.data import pipeline, pixels
from train.run import open_run


def colours(side: int = 4, examples: int = 40) -> dict[str, dict[str, np.ndarray]]:
    """Images of three channels, of another size than any known set's."""
    rng = np.random.default_rng(0)

    def split(count: int, most: int) -> dict[str, np.ndarray]:
        image = rng.integers(0, most, (count, side, side, 3)).astype(np.uint8)
        return {"image": image, "label": np.arange(count) % 4}

    return {"train": split(examples, 200), "test": split(12, 256)}


def opened(name: str, **args: object) -> dict:
    """The task's arguments of a run, as its checkpoints have them."""
    config = support.make_config(
        common.phase(
            name="only",
            until={"steps": 1},
            optimizer=common.optimizer("sgd", learning_rate=0.1),
        ),
        model={"name": "mlp", "args": {"hidden": (4,)}},
    )
    config["data"] = common.data(name, batch_size=4, validation_examples=8)
    config["task"] = common.images()
    config["task"]["args"] |= args
    run = open_run(config_lib.to_json(config))
    (batch, *_) = run.eval_batches("test")
    model = run.build_model()
    assert (
        model(*run.task.inputs(batch, None)).shape[1] == run.data.facts["num_classes"]
    )
    return run.config["task"]["args"]


def test_the_data_set_says_it(capsys):
    """Known ones by the table, others by their training images alone; the model gets
    the shape of the images in either case, and the config says all of it."""
    args = opened("digits")
    assert (args["mean"], args["std"]) == ([4.88], [6.02])
    own = f"{__name__}:colours"
    args = opened(own)
    train = pipeline.load_dataset(colours, validation_examples=8).splits["train"]
    images = train.batch(np.arange(len(train)))["image"].astype(np.float64)
    np.testing.assert_allclose(args["mean"], images.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(args["std"], images.std(axis=(0, 1, 2)), rtol=1e-5)
    said = capsys.readouterr().err.splitlines()
    assert "measuring the pixels of 32 training images ..." in said
    assert f"pixels of {own}: mean {args['mean']}, deviation {args['std']}" == said[-1]
    assert opened(own) == args


def test_explicit_values_stay(capsys):
    """With a line where the set has others; none where nothing is known of it."""
    args = opened("digits", mean=[33.3], std=[6.02])
    assert (args["mean"], args["std"]) == ([33.3], [6.02])
    warning = (
        "config.task.args.mean: [33.3] is not that of digits, which has [4.88]; ()"
        " takes that."
    )
    assert [
        line for line in capsys.readouterr().err.splitlines() if "args" in line
    ] == [warning]
    args = opened(f"{__name__}:colours", mean=[100.0], std=[50.0])
    assert (args["mean"], args["std"]) == ([100.0], [50.0])
    assert "args" not in capsys.readouterr().err


def test_every_n_th_of_a_large_set(monkeypatch):
    monkeypatch.setattr(pixels, "MOST_MEASURED", 10)
    data = pipeline.load_dataset(colours, validation_examples=8)
    images = data.splits["train"].batch(np.arange(0, 32, 4))["image"]
    mean = pixels.measure(data)["mean"]
    assert mean == pytest.approx(images.mean(axis=(0, 1, 2)).tolist(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_table_is_what_is_measured(name):
    """To the digits that it has, on other examples than it was made of."""
    data = pipeline.load_dataset(name, validation_examples=5000)
    measured = pixels.measure(data)
    for key, values in pixels.PIXELS[name].items():
        np.testing.assert_allclose(measured[key], values, rtol=3e-3)
