"""Someone's own model and data, by import path."""

import pytest
import support
from loop_configs import make_config, phase
from support import interrupt

from configs import common
from lowrank_jax import checkpoint
from lowrank_jax.errors import UserError
from train import loop

named = common.named

OWN_CODE = '''
"""Someone's own model and data."""
import numpy as np
from flax import nnx


class Net(nnx.Module):
    def __init__(self, size, classes, rngs):
        self.layer = nnx.Linear(size, classes, rngs=rngs)

    def __call__(self, images):
        return self.layer(images.reshape(images.shape[0], -1))


def net(*, image_shape, num_classes, rngs):
    return Net(image_shape[0] * image_shape[1] * image_shape[2], num_classes, rngs)


def data(*, examples):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, 3, 2, 1), dtype=np.uint8)
    labels = (images[:, 0, 0, 0] > 127).astype(np.int64)
    train = {"image": images, "label": labels}
    return {"train": train, "test": {key: x[:8] for key, x in train.items()}}
'''


class TestOwnCode:
    def test_model_and_data_by_import_path(self, tmp_path, monkeypatch):
        """They train; from a checkpoint they are imported with consent only."""
        (tmp_path / "own_h7_code.py").write_text(OWN_CODE)
        monkeypatch.syspath_prepend(tmp_path)
        config = make_config(phase(4))
        config["data"] |= {"name": "own_h7_code:data", "args": {"examples": 40}}
        config["data"] |= {"batch_size": 10, "validation_examples": 10}
        config["task"]["args"] |= {"mean": [128.0], "std": [74.0]}
        config["model"] = named("own_h7_code:net")
        workdir = tmp_path / "run"
        interrupt(config, workdir, 2)
        result = loop.train_and_evaluate(config, workdir)
        assert result["step"] == 4 and result["frontier"]
        cut = tmp_path / "cut"
        with pytest.raises(UserError, match="--allow_imports=own_h7_code"):
            support.evaluate(workdir)
        with pytest.raises(UserError, match="--allow_imports=own_h7_code"):
            support.truncate(workdir, cut, "rank", 1)
        allowed = {"allow_imports": ["own_h7_code"]}
        assert support.evaluate(workdir, **allowed)["ranks"] == {"layer": 2}
        support.truncate(workdir, cut, "rank", 1, **allowed)
        assert checkpoint.open_checkpoint(cut).max_ranks == {"layer": 1}
