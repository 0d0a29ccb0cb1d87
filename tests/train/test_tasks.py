"""What every task must hold, a row each; classification against NumPy in float64."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_package import model as own_model
from reference import relative_error

from lowrank_jax.errors import UserError
from train import registry
from train.data import augmentation, sources, tokenizers
from train.models import encoder_decoder, lenet, transformer
from train.tasks import TASKS
from train.tasks.base import Task
from train.tasks.classification import classification

IMAGES = {
    "arrays": {
        "image": {"shape": [16, 18, 2], "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    },
    "num_classes": 5,
}
VECTORS = {
    "arrays": {
        "x": {"shape": [7], "dtype": "float32"},
        "y": {"shape": [5], "dtype": "float32"},
    }
}
PIXELS = {"mean": [100.0, 20.0], "std": [50.0, 60.0]}
AUGMENT = [["random_crop", {"padding": 2}], ["random_flip", {}]]
SIZE = 6


WINDOWS = {
    "arrays": {
        "tokens": {"shape": [8], "dtype": "uint8"},
        "length": {"shape": [], "dtype": "int32"},
    },
    "vocab_size": 5,
    "tokenizer": tokenizers.build(
        {"name": "characters", "args": {}}, ["abcde"]
    ).to_facts(),
}


PAIRS = {
    "arrays": {
        name: {"shape": [8], "dtype": "uint8"}
        for name in ("source", "source_segment", "target", "label", "target_segment")
    },
    "vocab_size": 5,
    "specials": {"pad": 0, "bos": 1, "eos": 2},
    "tokenizer": tokenizers.build(
        {"name": "characters", "args": {}}, ["ab"], reserved=3
    ).to_facts(),
}


class Row(NamedTuple):
    """A task by its name in a config, and a model for it."""

    name: str
    facts: dict[str, Any]
    args: dict[str, Any]
    model: Callable[..., nnx.Module]
    perfect: Callable[[dict[str, Any]], jax.Array]
    """Outputs that nothing can better, of a batch."""
    outputs: tuple[int, ...] = (5,)
    """Shape of the outputs of one example."""
    counted: Callable[[dict[str, Any]], jax.Array] = lambda batch: jnp.ones(SIZE)
    """How much each example weighs beside its own weight."""
    augments: bool = True
    """Whether a key changes the inputs."""


def tokens_right(labels: jax.Array) -> jax.Array:
    return 100.0 * jax.nn.one_hot(labels, 5)


ROWS = {
    "classification": Row(
        "classification",
        IMAGES,
        {**PIXELS, "augment": AUGMENT},
        lenet.build,
        lambda batch: 100.0 * jax.nn.one_hot(batch["label"], 5),
    ),
    "regression": Row(
        "own_package.task:regression",
        VECTORS,
        {"noise": 0.1},
        own_model.build,
        lambda batch: batch["y"],
    ),
    "language_model": Row(
        "language_model",
        WINDOWS,
        {},
        functools.partial(transformer.build, depth=1, embed_dim=8, num_heads=2),
        lambda batch: tokens_right(batch["tokens"][:, 1:]),
        outputs=(7, 5),
        counted=lambda batch: batch["length"],
        augments=False,
    ),
    "translation": Row(
        "translation",
        PAIRS,
        {},
        functools.partial(
            encoder_decoder.build,
            depth=1,
            embed_dim=8,
            num_heads=2,
            dropout_rate=0.0,
        ),
        lambda batch: tokens_right(batch["label"]),
        outputs=(8, 5),
        counted=lambda batch: (batch["target_segment"] > 0).sum(axis=1),
        augments=False,
    ),
}
every_task = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def make(row: Row) -> Task:
    spec = {"name": row.name, "args": row.args}
    return registry.build(spec, TASKS, row.facts, allow_imports=None)


def batch_of(facts: dict[str, Any], size: int, seed: int = 0) -> dict[str, jax.Array]:
    """A random batch of the arrays that the facts name."""
    rng, batch = np.random.default_rng(seed), {}
    for name, array in facts["arrays"].items():
        shape, top = (size, *array["shape"]), 256 if name == "image" else 5
        whole = rng.integers(0, top, shape)
        values = rng.normal(size=shape) if "float" in array["dtype"] else whole
        batch[name] = jnp.asarray(values, array["dtype"])
    return batch


def outputs_of(row: Row, size: int = SIZE, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (size, *row.outputs))


def test_every_task_has_a_row():
    assert set(TASKS) <= {row.name for row in ROWS.values()}


@every_task
def test_the_example_fits_the_model_and_the_inputs(row):
    """One unit goes through as a batch does, whatever JSON has made of the model's
    arguments."""
    task, batch = make(row), batch_of(row.facts, SIZE)
    args = json.loads(json.dumps(task.model_args))
    model = row.model(**args, rngs=nnx.Rngs(0))
    for key in (None, jax.random.key(0)):
        inputs = task.inputs(batch, key)
        assert [(x.ndim, x.dtype) for x in inputs] == [
            (x.ndim, x.dtype) for x in task.example
        ]
        assert {len(x) for x in inputs} == {SIZE}
    assert {len(x) for x in task.example} == {1}
    outputs = nnx.eval_shape(lambda *example: model(*example), *task.example)
    unit = () if task.unit == "example" else (1,)
    assert outputs.shape == (1, *unit, 5)
    outputs = nnx.eval_shape(lambda *inputs: model(*inputs), *inputs)
    assert outputs.shape == (SIZE, *row.outputs)
    loss = jax.eval_shape(lambda: task.loss(model(*inputs), batch))
    assert loss.shape == ()


@every_task
def test_inputs_change_with_a_key_alone(row):
    task, batch = make(row), batch_of(row.facts, SIZE)
    plain, again = task.inputs(batch, None)[0], task.inputs(batch, None)[0]
    first, same, second = (
        task.inputs(batch, jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(first, same)
    for other in (plain, second):
        assert np.array_equal(first, other) != row.augments


@every_task
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_sum_by_weight(row, weighted):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    weight = jnp.arange(SIZE) / 4 if weighted else jnp.ones(SIZE)
    if weighted:
        batch["weight"] = weight
    sums = task.sums(outputs, batch)
    assert sums["weight"] == jnp.sum(weight * row.counted(batch))
    loss = task.loss(outputs, batch)
    assert relative_error(sums["loss"] / sums["weight"], loss) <= 1e-6
    figures = task.figures(sums)
    assert relative_error(figures["loss"], loss) <= 1e-6
    assert task.headline in figures and "weight" not in figures
    assert all(type(figure) is float for figure in figures.values())


@every_task
def test_a_weight_of_one_changes_nothing(row):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    ones = {**batch, "weight": jnp.ones(SIZE)}
    teacher = outputs_of(row, seed=2)
    for function in (task.loss, lambda *args: task.distill(args[0], teacher, args[1])):
        assert relative_error(function(outputs, ones), function(outputs, batch)) <= 1e-6
    assert task.figures(task.sums(outputs, ones)) == task.figures(
        task.sums(outputs, batch)
    )


@every_task
def test_rows_of_weight_zero_change_nothing(row):
    """In the loss, in what a pupil learns, in the gradients and in the figures."""
    task, outputs, teacher = make(row), outputs_of(row), outputs_of(row, seed=2)
    batch = batch_of(row.facts, SIZE)
    batch["weight"] = jnp.asarray([1.0, 0.5, 2.0, 1.0, 0.0, 0.0])
    kept = {name: array[:4] for name, array in batch.items()}

    def losses(outputs, teacher, batch):
        return jnp.stack(
            [task.loss(outputs, batch), task.distill(outputs, teacher, batch)]
        )

    found, expected = (
        losses(outputs, teacher, batch),
        losses(outputs[:4], teacher[:4], kept),
    )
    assert relative_error(found, expected) <= 1e-6
    assert row.counted(batch)[:4].sum() > 0
    gradients = jax.jacrev(losses)(outputs, teacher, batch)
    assert (gradients[:, 4:] == 0).all() and (gradients[:, :4] != 0).any()
    figures = task.figures(task.sums(outputs, batch))
    for name, figure in task.figures(task.sums(outputs[:4], kept)).items():
        assert relative_error(figures[name], figure) <= 1e-6


@every_task
def test_a_part_in_which_nothing_counts_adds_nothing(row):
    """It is one of several, of equal size, when gradients are accumulated."""
    task, outputs, teacher = make(row), outputs_of(row), outputs_of(row, seed=2)
    batch = {**batch_of(row.facts, SIZE), "weight": jnp.zeros(SIZE)}

    def losses(outputs):
        return task.loss(outputs, batch) + task.distill(outputs, teacher, batch)

    loss, gradient = jax.value_and_grad(losses)(outputs)
    assert loss == 0 and (gradient == 0).all()
    with pytest.raises(UserError, match="data: must hold something that counts"):
        task.figures(task.sums(outputs, batch))


@every_task
def test_sums_add_up_over_batches(row):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    whole = task.figures(task.sums(outputs, batch))
    parts = [
        task.sums(outputs[part], {name: array[part] for name, array in batch.items()})
        for part in (slice(0, 3), slice(3, SIZE))
    ]
    added = task.figures(jax.tree.map(lambda *parts: sum(parts), *parts))
    assert whole.keys() == added.keys()
    for name in whole:
        assert relative_error(added[name], whole[name]) <= 1e-6


@every_task
def test_a_pupil_learns_to_agree_with_its_teacher(row):
    """Where both agree the loss is least, and its gradient zero."""
    task, batch, teacher = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    distill = lambda outputs: task.distill(outputs, teacher, batch)  # noqa: E731
    assert jnp.abs(jax.grad(distill)(teacher)).max() <= 1e-7
    assert jnp.abs(jax.grad(distill)(outputs_of(row, seed=2))).max() >= 1e-3
    for seed in range(2, 6):
        assert distill(teacher) < distill(outputs_of(row, seed=seed))
        assert distill(teacher) < distill(teacher + 0.1 * outputs_of(row, seed=seed))


@every_task
def test_the_headline_says_which_is_better(row):
    task, batch = make(row), batch_of(row.facts, SIZE)
    good, bad = (
        task.figures(task.sums(outputs, batch))
        for outputs in (row.perfect(batch), outputs_of(row))
    )
    assert good["loss"] < bad["loss"]
    assert (good[task.headline] > bad[task.headline]) == task.higher_is_better
    assert good[task.headline] != bad[task.headline]


@every_task
def test_tasks_are_traced(row):
    """Under jit as outside it; figures alone are made of numbers."""
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    key = jax.random.key(0)
    traced, plain = jax.jit(task.inputs)(batch, key), task.inputs(batch, key)
    for ours, theirs in zip(traced, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    jitted = jax.jit(task.sums)(outputs, batch)
    for name, value in task.sums(outputs, batch).items():
        assert relative_error(jitted[name], value) <= 1e-6


# Classification itself.


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
