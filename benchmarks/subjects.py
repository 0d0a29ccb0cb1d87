"""What benchmarks time: dense models, what they learn, and a random batch of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from configs import shakespeare
from configs import text as text_configs
from train.models import lenet, mlp, resnet, transformer, vit
from train.tasks.base import Task
from train.tasks.classification import classification
from train.tasks.language_model import language_model


class Subject(NamedTuple):
    """A dense model, what it learns, from what, and which layers become low-rank."""

    dense: nnx.Module
    task: Task
    batch: dict[str, Any]
    rules: Sequence[tuple[str, Any]] = ((".*", "full"),)


def images(shape: tuple[int, ...], size: int) -> tuple[Task, dict[str, Any]]:
    """Returns a classification with ten classes and a random batch of it."""
    image = {"shape": list(shape), "dtype": "uint8"}
    arrays = {"image": image, "label": {"shape": [], "dtype": "int32"}}
    facts = {"arrays": arrays, "num_classes": 10}
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (size, *shape), dtype=np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
    return classification(facts, mean=[33.3], std=[78.6], augment=[]), batch


def windows(context: int, size: int) -> tuple[Task, dict[str, Any]]:
    """Returns a language model's task with 65 characters and a random batch of it."""
    arrays = {"tokens": {"shape": [context + 1], "dtype": "uint8"}}
    tokens = np.random.default_rng(0).integers(0, 65, (size, context + 1))
    task = language_model({"arrays": arrays, "vocab_size": 65})
    return task, {"tokens": tokens.astype(np.uint8)}


def _of_images(
    build: Callable[..., nnx.Module], shape: tuple[int, ...], size: int, **args: Any
) -> Subject:
    model = build(image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **args)
    return Subject(model, *images(shape, size))


def _of_text(arg: str, size: int) -> Subject:
    """The language model of a variant of configs/shakespeare.py."""
    config = shakespeare.get_config(arg)
    task, batch = windows(config.data.args.context, size)
    model = transformer.build(
        **task.model_args, **config.model["args"], rngs=nnx.Rngs(0)
    )
    return Subject(model, task, batch, text_configs.rank_rules("full"))


SUBJECTS: dict[str, tuple[Callable[[int], Subject], int]] = {
    "mlp": (
        lambda size: _of_images(mlp.build, (8, 8, 1), size, hidden=(1024, 1024)),
        8,
    ),
    "lenet": (lambda size: _of_images(lenet.build, (28, 28, 1), size), 128),
    "resnet18": (lambda size: _of_images(resnet.build, (32, 32, 3), size), 32),
    "vit": (lambda size: _of_images(vit.build, (16, 16, 3), size), 128),
    "vit_s4": (
        lambda size: _of_images(
            vit.build,
            (32, 32, 3),
            size,
            patch_size=4,
            embed_dim=384,
            depth=12,
            num_heads=6,
            mlp_dim=1536,
        ),
        8,
    ),
    "shakespeare:cpu": (lambda size: _of_text("cpu", size), 32),
    "transformer": (lambda size: _of_text("", size), 4),
}
"""By name: what makes one for so many examples, and how many a CPU is given: a wide
perceptron, LeNet, ResNet-18 with the 3x3 stem, a small ViT and ViT-S/4 on 32x32 pixels,
the language models of configs/shakespeare.py, with 4 layers of width 128 and 6 of width
384."""


def make(name: str, batch_size: int = 0) -> Subject:
    """Makes a subject by its name, with its own batch size for 0."""
    build, own_size = SUBJECTS[name]
    return build(batch_size or own_size)
