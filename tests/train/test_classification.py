"""Classification against NumPy in float64, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error
from task_rows import (
    AUGMENT,
    IMAGES,
    PIXELS,
    ROWS,
    SIZE,
    VECTORS,
    batch_of,
    make,
    outputs_of,
)

from lowrank_jax.errors import UserError
from train.data import augmentation, sources
from train.tasks.classification import classification


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 0.5, 2.0, 1.0, 0.0]])
def test_classification_in_float64(weight):
    """Cross-entropy with labels and with the teacher's softmax, and accuracy."""
    task, batch = make(ROWS["classification"]), batch_of(IMAGES, SIZE)
    if weight is not None:
        batch["weight"] = jnp.asarray(weight)
    share = np.ones(SIZE) if weight is None else np.asarray(weight)
    share = share / share.sum()
    row = ROWS["classification"]
    outputs, teacher = 3 * outputs_of(row), 3 * outputs_of(row, seed=2)
    logits, theirs = np.asarray(outputs, np.float64), np.asarray(teacher, np.float64)
    labels = np.asarray(batch["label"])
    losses = -log_softmax(logits)[np.arange(SIZE), labels]
    assert relative_error(task.loss(outputs, batch), share @ losses) <= 1e-6
    soft = -np.sum(np.exp(log_softmax(theirs)) * log_softmax(logits), axis=-1)
    assert relative_error(task.distill(outputs, teacher, batch), share @ soft) <= 1e-6
    figures = task.figures(task.sums(outputs, batch))
    assert relative_error(
        figures["accuracy"], share @ (logits.argmax(-1) == labels)
    ) < (1e-6)
    assert relative_error(figures["loss"], share @ losses) <= 1e-6


def test_images_are_augmented_as_pixels_then_normalized():
    """The same pixels as `make_augment` gives for the same key."""
    task, batch = make(ROWS["classification"]), batch_of(IMAGES, SIZE)
    key = jax.random.key(3)
    augmented = augmentation.make_augment(AUGMENT)(key, batch["image"])
    (inputs,) = task.inputs(batch, key)
    (plain,) = task.inputs({**batch, "image": augmented}, None)
    np.testing.assert_array_equal(inputs, plain)
    mean, std = (np.asarray(PIXELS[name]) for name in ("mean", "std"))
    assert relative_error(inputs, (np.asarray(augmented) - mean) / std) <= 1e-6


def test_one_number_normalizes_all_channels():
    args = {"mean": [100.0], "std": [50.0], "augment": []}
    batch = batch_of(IMAGES, SIZE)
    (inputs,) = classification(IMAGES, **args).inputs(batch, None)
    assert relative_error(inputs, (np.asarray(batch["image"]) - 100.0) / 50) <= 1e-6


GOOD = {**PIXELS, "augment": []}
GRAY = {"shape": [4, 4], "dtype": "uint8"}
SCORE = {"shape": [], "dtype": "float32"}

MISTAKES = {
    "no images": (VECTORS, {}, ["'image'", "'label'", "'x': 'float32 [7]'"]),
    "no channels": (
        {"arrays": {**IMAGES["arrays"], "image": GRAY}, "num_classes": 5},
        {},
        ["'image' uint8 [x, y, c]", "[4, 4]"],
    ),
    "no class indices": (
        {"arrays": {**IMAGES["arrays"], "label": SCORE}},
        {},
        ["'label', one integer", "float32"],
    ),
    "negative labels": (
        {"arrays": IMAGES["arrays"]},
        {},
        ["'label' must be class indices from 0"],
    ),
    "channels": (
        IMAGES,
        {"mean": [0.0] * 3, "std": [1.0] * 3},
        ["mean: ", "std: ", "2 channels", "[0.0, 0.0, 0.0]"],
    ),
    "text": (IMAGES, {"mean": ["a"], "std": 3.0}, ["mean: ", "['a']", "std: ", "3.0"]),
    "deviation": (IMAGES, {"std": [1.0, 0.0]}, ["std: must be above 0", "[1.0, 0.0]"]),
    "no float32": (
        IMAGES,
        {"mean": [1e300], "std": [1e-300]},
        ["mean: must be at most 1e+30", "std: must be above 0"],
    ),
    "augmentation": (IMAGES, {"augment": [["mixup", {}]]}, ["augment[0]", "'mixup'"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_a_classification_refuses(case):
    facts, args, parts = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        classification(facts, **{**GOOD, **args})
    for part in parts:
        assert part in str(caught.value)


def test_logits_of_another_width_are_refused():
    """While tracing, so before the first step."""
    task, batch = classification(IMAGES, **GOOD), batch_of(IMAGES, SIZE)
    logits = jax.ShapeDtypeStruct((SIZE, 4), jnp.float32)
    for function in (task.loss, task.sums):
        with pytest.raises(UserError, match=r"logits \(6, 5\), got \(6, 4\)"):
            jax.eval_shape(function, logits, batch)


def test_it_reads_the_facts_of_a_source():
    facts = sources.open_dataset("digits").facts
    task = classification(facts, mean=[4.88], std=[6.02], augment=[])
    assert task.model_args == {"image_shape": (8, 8, 1), "num_classes": 10}
    assert task.example[0].shape == (1, 8, 8, 1)
