"""Mean and deviation of the pixels of a data set: known by its name, or measured."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.data.pipeline import Dataset
from train.report import logs

PIXELS: dict[str, dict[str, list[float]]] = {
    "cifar10": {"mean": [125.31, 122.95, 113.87], "std": [62.99, 62.09, 66.70]},
    "digits": {"mean": [4.88], "std": [6.02]},
    "mnist": {"mean": [33.3], "std": [78.6]},
}
"""Of the training images, by channel, of sets that are known by name."""

MOST_MEASURED = 50_000
_AT_ONCE = 1000


def normalization(given: Mapping[str, Any], data: Dataset) -> dict[str, list[float]]:
    """Returns "mean" and "std" for images of a data set.

    Values that are given stay, and a line says where they are not those of the set;
    empty ones become the set's own.

    Args:
      given: Of the config.
      data: What is trained on.
    """
    name = re.sub(r":[\d.]+$", "", data.name)  # a version of a set
    own: dict[str, Any] = PIXELS.get(name, {})
    empty = [key for key in ("mean", "std") if given[key] in ([], ())]
    if empty and not own:
        own = measure(data)
    for key in {"mean", "std"} & own.keys() - set(empty):
        listed = isinstance(given[key], list | tuple)  # else an error to come
        if listed and name in PIXELS and list(given[key]) != own[key]:
            logs.say(
                f"config.task.args.{key}: {given[key]} is not that of {name}, which has"
                f" {own[key]}; () takes that."
            )
    return {key: own[key] if key in empty else given[key] for key in ("mean", "std")}


def measure(data: Dataset) -> dict[str, list[float]]:
    """Measures mean and deviation by channel on training images, held-out ones left
    out; of a large set on every n-th, the same ones in every run."""
    train = data.splits["train"]
    rows = np.arange(0, len(train), -(-len(train) // MOST_MEASURED))
    count, total, squares = 0, 0.0, 0.0
    with logs.stage(f"measuring the pixels of {len(rows):,} training images"):
        for start in range(0, len(rows), _AT_ONCE):
            images = train.batch(rows[start : start + _AT_ONCE])["image"]
            pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
            count += len(pixels)
            total = total + pixels.sum(axis=0)
            squares = squares + (pixels**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    found = {"mean": _rounded(mean), "std": _rounded(np.where(std > 0, std, 1.0))}
    logs.say(f"pixels of {data.name}: mean {found['mean']}, deviation {found['std']}")
    return found


def _rounded(values: np.ndarray) -> list[float]:
    """Digits that no order of summation changes."""
    return [float(f"{value:.6g}") for value in values]
