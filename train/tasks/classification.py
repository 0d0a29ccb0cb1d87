"""Classification of images: softmax cross-entropy, judged by accuracy.

Letters: `b` batch, `x y` space, `c` channels, `o` classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from lowrank_jax.errors import UserError, raise_all
from train.data import augmentation, pixels
from train.data.pipeline import Dataset
from train.tasks import base
from train.tasks.base import Batch, Task

Logits = Float[Array, "b o"]

MOST_CLASSES = 2**20
"""Beyond it a head is larger than a machine."""

LARGEST = 1e30
"""Of the constants of pixels, and its inverse the least: float32 holds them."""


def classification(
    facts: Mapping[str, Any],
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    augment: Sequence[Sequence[Any]],
) -> Task:
    """Makes the task of a data set with "image" uint8 (x, y, c) and integer "label".

    Models map images (b, x, y, c), augmented where they are trained on and then
    normalized, to logits (b, o). A pupil learns the cross-entropy with its teacher's
    softmax (Horvath et al., 2021).

    Args:
      facts: The data set's facts; "num_classes" among them.
      mean: Subtracted from the pixels: one number, or one for each channel; () in a
        config for that of the data set.
      std: What they are then divided by, likewise.
      augment: Pairs of an augmentation's name and its arguments, in order (see
        `train.data.augmentation`).

    Raises:
      UserError: Arrays that are none of a classification's, or unfit arguments.
    """
    _check_facts(facts)
    image_shape, num_classes = facts["arrays"]["image"]["shape"], facts["num_classes"]
    _check_constants(mean, std, image_shape[-1])
    change, prepare = augmentation.make_augment(augment), normalize(mean, std)

    def inputs(batch: Batch, key: PRNGKeyArray | None) -> tuple[Array]:
        images = batch["image"]
        return (prepare(images if key is None else change(key, images)),)

    def losses(logits: Logits, batch: Batch) -> Float[Array, " b"]:
        _check_logits(logits, (len(batch["label"]), num_classes))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def loss(logits: Logits, batch: Batch) -> Float[Array, ""]:
        return base.weighted_mean(losses(logits, batch), batch)

    def distill(logits: Logits, teacher: Logits, batch: Batch) -> Float[Array, ""]:
        targets = jax.nn.softmax(teacher)
        return base.weighted_mean(optax.softmax_cross_entropy(logits, targets), batch)

    def sums(logits: Logits, batch: Batch) -> dict[str, Array]:
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        return base.weighted_sums(batch, accuracy=hits, loss=losses(logits, batch))

    return Task(
        model_args={"image_shape": tuple(image_shape), "num_classes": num_classes},
        example=(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),),
        inputs=inputs,
        loss=loss,
        distill=distill,
        sums=sums,
        figures=base.figures_per_weight,
        headline="accuracy",
        higher_is_better=True,
    )


def complete_args(args: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Returns the arguments with what the data say: their mean and deviation."""
    _check_facts(data.facts)
    return {**args, **pixels.normalization(args, data)}


def normalize(
    mean: Sequence[float], std: Sequence[float]
) -> Callable[[UInt8[Array, "b x y c"]], Float[Array, "b x y c"]]:
    """Makes the map from pixels to numbers of mean 0 and deviation 1.

    Args:
      mean: Constants to subtract: one, or one for each channel.
      std: Constants to divide by, likewise.
    """
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def prepare(images: UInt8[Array, "b x y c"]) -> Float[Array, "b x y c"]:
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images.astype(jnp.float32) - shift.reshape(shape)) / scale.reshape(
            shape
        )

    return prepare


def _check_logits(logits: Logits, shape: tuple[int, int]) -> None:
    """Logits of another width would go through the loss unseen."""
    if logits.shape != shape:
        raise UserError(
            f"model: must map {shape[0]} images to logits {shape}, got {logits.shape}."
            " Build its last layer with num_classes features."
        )


def _check_facts(facts: Mapping[str, Any]) -> None:
    """A classification needs images, class indices and their number."""
    arrays, problems = facts["arrays"], []
    image, label = (arrays.get(name) for name in ("image", "label"))
    right = image and image["dtype"] == "uint8" and len(image["shape"]) == 3
    if not right or not all(image["shape"]):
        problems.append(
            "data: must have 'image' uint8 [x, y, c], got"
            f" {image or _shown(arrays)}. Scale to 0..255, cast, and keep the channel"
            " axis."
        )
    is_index = label and label["shape"] == [] and "int" in label["dtype"]
    if not is_index:
        problems.append(
            "data: must have 'label', one integer for each image, got"
            f" {label or _shown(arrays)}. Give class indices from 0."
        )
    elif "num_classes" not in facts:
        problems.append(
            "data: 'label' must be class indices from 0, got no 'num_classes' in the"
            " facts, so some are negative. Give class indices from 0."
        )
    elif not _is_count(facts["num_classes"]):
        problems.append(
            f"data: 'num_classes' must be in [1, {MOST_CLASSES:,}], got"
            f" {facts['num_classes']!r}. Give the number of classes."
        )
    raise_all(problems)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_CLASSES


def _shown(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: f"{a['dtype']} {a['shape']}" for name, a in arrays.items()}


def _check_constants(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> None:
    """One number for all channels or one for each; deviations above 0."""
    problems = []
    for name, values in (("mean", mean), ("std", std)):
        is_list = isinstance(values, list | tuple) and len(values) in (1, channels)
        if not is_list or not all(map(_is_number, values)):
            problems.append(
                f"{name}: must be a list of one number, or of one for each of"
                f" {channels} channels, got {values!r}. Give that many."
            )
        elif max(map(abs, values)) > LARGEST:
            problems.append(
                f"{name}: must be at most {LARGEST:g} in magnitude, got {values!r}."
                " Lower it."
            )
        elif name == "std" and min(values) < 1 / LARGEST:
            problems.append(f"std: must be above 0, got {values!r}. Raise it.")
    raise_all(problems)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
