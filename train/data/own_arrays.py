"""The arrays that a function of the user's returns, checked.

The function returns {"train": {name: array}, "test": {name: array}}, one row an
example, and may add "facts", a dict of JSON values for the task.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax.errors import UserError, raise_all

Arrays = dict[str, np.ndarray]
"""The same number of rows of each named array: `(n, ...)`, one row an example."""

SPLITS = ("train", "test")
TOKENS = ("tokens", "source", "target", "label")
"""Arrays of tasks on text that hold ids, where the facts have a "vocab_size"."""


def read(
    build: Callable[..., Mapping], args: Mapping[str, Any]
) -> tuple[dict[str, Arrays], dict[str, Any]]:
    """Calls the function and returns its splits with what is known of them.

    Returns:
      The arrays of "train" and "test", 64 bits cut to 32 as everywhere in JAX, and
      the facts: "arrays" (name -> "shape" and "dtype" of one example), the function's
      own, and "num_classes" where "label" looks like a class index.

    Raises:
      UserError: Arrays that are none, or do not fit together; lists every offender.
    """
    signature = inspect.signature(build)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise UserError(
            f"args must be of {list(signature.parameters)}, got {sorted(args)}:"
            f" {error}. Correct them."
        ) from error
    result = build(**args)
    if not isinstance(result, Mapping) or not (
        set(SPLITS) <= set(result) <= {*SPLITS, "facts"}
    ):
        got = sorted(result) if isinstance(result, Mapping) else type(result).__name__
        raise UserError(
            "must return a dict with 'train' and 'test', and 'facts' if it has any, got"
            f" {got}. Return {{'train': {{'image': array, ...}}, 'test': {{...}}}}."
        )
    splits, problems = {}, []
    for split in SPLITS:
        splits[split], found = _read_split(result[split])
        problems += [f"{split}{problem}" for problem in found]
    raise_all(problems)
    facts = _shared_arrays(splits) | _own_facts(result.get("facts", {}))
    _check_tokens(facts, splits)
    return splits, _with_num_classes(facts, splits)


def _read_split(values: Any) -> tuple[Arrays, list[str]]:
    """The arrays of one split, and what is wrong with them."""
    if not isinstance(values, Mapping) or not values:
        got = "none" if isinstance(values, Mapping) else type(values).__name__
        return {}, [
            f" must be a dict of named arrays, got {got}. Return {{'image': images,"
            " 'label': labels} instead of (images, labels), or names of your own."
        ]
    arrays: Arrays = {}
    problems = []
    for name, value in values.items():
        try:
            arrays[name] = _read_array(name, value)
        except UserError as error:
            problems.append(f"[{name!r}] {error}")
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        problems.append(
            f" must have as many rows in every array, got {sizes}. Give each example a"
            " row in each."
        )
    elif 0 in sizes.values():
        problems.append(f" must hold at least one example, got {sizes}. Add some.")
    return arrays, problems


def _read_array(name: Any, value: Any) -> np.ndarray:
    """One array in the type that JAX computes in."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of several lengths
        raise UserError(f"must be an array, got a list: {error}. Pad it.") from error
    dtype = array.dtype
    is_number = jax.dtypes.issubdtype(dtype, np.number) or dtype == np.bool_
    if not isinstance(name, str) or not is_number or array.ndim == 0:
        raise UserError(
            "must be numbers under a name, a row an example, got"
            f" {dtype} {array.shape}. Encode it as numbers."
        )
    if name == "weight":
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
            raise UserError(
                "must be one finite number of at least 0 for each example, as it is"
                f" how much they count, got {dtype} {array.shape}. Rename or correct"
                " it."
            )
        return array.astype(np.float32, copy=False)
    computed = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    if computed != dtype and dtype.kind in "iu" and array.size:
        limits, low, high = np.iinfo(computed), array.min(), array.max()
        if low < limits.min or high > limits.max:
            raise UserError(
                f"must fit into {computed}, got {low} to {high}."
                " Scale them, or give floats."
            )
    return array.astype(computed, copy=False)


def _shared_arrays(splits: Mapping[str, Arrays]) -> dict[str, Any]:
    """Names, shapes and types of one example, the same in both splits."""
    train, test = (
        {
            name: {"shape": list(array.shape[1:]), "dtype": str(array.dtype)}
            for name, array in splits[split].items()
        }
        for split in SPLITS
    )
    raise_all(
        [
            f"{name!r} must be the same in both splits, got {train.get(name, 'none')}"
            f" to train on and {test.get(name, 'none')} to test on. Make them equal."
            for name in sorted({*train, *test})
            if train.get(name) != test.get(name)
        ]
    )
    return {"arrays": train}


def _own_facts(given: Any) -> dict[str, Any]:
    """What the function says of its examples, as plain JSON."""
    try:
        facts = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"'facts' must hold JSON values only, got {error}. Convert them."
        ) from error
    if not isinstance(facts, dict) or "arrays" in facts:
        raise UserError(
            "'facts' must be a dict without 'arrays', which the arrays themselves say,"
            f" got {facts}. Correct it."
        )
    return facts


def _check_tokens(facts: Mapping[str, Any], splits: Mapping[str, Arrays]) -> None:
    """Tokens that no row of an embedding stands for would be read as others, or NaN."""
    size = facts.get("vocab_size")
    if type(size) is not int:
        return
    found = {
        f"{split}[{name!r}]": (int(array.min()), int(array.max()))
        for split, arrays in splits.items()
        for name, array in arrays.items()
        if name in TOKENS and array.dtype.kind in "iu" and array.size
    }
    raise_all(
        [
            f"{place}: must hold tokens in [0, {size - 1}], as facts['vocab_size'] is"
            f" {size}, got {low} to {high}. Correct one of them; padding is a token"
            " too, such as 0."
            for place, (low, high) in found.items()
            if low < 0 or high >= size
        ]
    )


def _with_num_classes(
    facts: dict[str, Any], splits: Mapping[str, Arrays]
) -> dict[str, Any]:
    """The facts with the number of classes, where "label" looks like class indices."""
    labels = [arrays["label"] for arrays in splits.values() if "label" in arrays]
    are_indices = labels and all(
        array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0
        for array in labels
    )
    if not are_indices:
        return facts
    needed = 1 + max(int(array.max()) for array in labels)
    num_classes = facts.get("num_classes", needed)
    if not isinstance(num_classes, int) or num_classes < needed:
        raise UserError(
            f"facts['num_classes'] must be a whole number of at least {needed}, as"
            f" 'label' goes to {needed - 1}, got {num_classes!r}. Correct one of them."
        )
    return {**facts, "num_classes": num_classes}
