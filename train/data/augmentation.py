"""Random changes to a batch of images, traced inside the training step.

Each is a pure function (key, images) -> images that keeps shape and dtype and acts
before normalisation. Letters: `b` batch, `x y` space, `c` channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, PRNGKeyArray

from lowrank_jax.errors import UserError, raise_all, unknown

Images = Num[Array, "b x y c"]
Augment = Callable[[PRNGKeyArray, Images], Images]

MOST_PADDING = 1024


def random_crop(key: PRNGKeyArray, images: Images, *, padding: int) -> Images:
    """Pads with zeros by `padding` pixels, then cuts each image at its own offset."""
    if not isinstance(padding, int) or not 1 <= padding <= MOST_PADDING:
        raise UserError(
            f"padding must be an integer in [1, {MOST_PADDING}], got {padding!r}."
            " Correct it."
        )
    batch, x, y, c = images.shape
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def cut(image: Num[Array, "..."], offset: Num[Array, " 2"]) -> Num[Array, "..."]:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (x, y, c))

    return jax.vmap(cut)(padded, offsets)


def random_flip(key: PRNGKeyArray, images: Images) -> Images:
    """Mirrors each image left to right with probability one half."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


AUGMENTATIONS: dict[str, Callable[..., Images]] = {
    "random_crop": random_crop,
    "random_flip": random_flip,
}


def make_augment(ops: Sequence[Sequence[Any]]) -> Augment:
    """Chains augmentations in the order given; none at all is the identity.

    Args:
      ops: pairs of a name in `AUGMENTATIONS` and its keyword arguments, such as
        `[("random_crop", {"padding": 4}), ("random_flip", {})]`.

    Raises:
      UserError: an unknown name or unfit arguments; lists every offender.
    """
    problems = [_problem(op) for op in ops]
    raise_all([f"augment[{n}] {text}" for n, text in enumerate(problems) if text])
    steps = [functools.partial(AUGMENTATIONS[name], **args) for name, args in ops]

    def augment(key: PRNGKeyArray, images: Images) -> Images:
        for index, step in enumerate(steps):
            images = step(jax.random.fold_in(key, index), images)
        return images

    return augment


def _problem(op: Any) -> str:
    """Traces one augmentation on a small image, so that bad arguments show early."""
    if not isinstance(op, list | tuple) or len(op) != 2:
        return f"must be a pair of a name and its arguments, got {op!r}. Write both."
    name, args = op
    if not isinstance(name, str) or name not in AUGMENTATIONS:
        return unknown("an augmentation", name, sorted(AUGMENTATIONS))
    if not isinstance(args, Mapping):
        return (
            f"{name}: arguments must be a mapping, got {args!r}. Write {{}} for none."
        )
    image = jax.ShapeDtypeStruct((2, 8, 6, 1), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        result = jax.eval_shape(
            functools.partial(AUGMENTATIONS[name], **args), key, image
        )
    except (TypeError, ValueError) as error:
        return f"{name}: {error}. Change its arguments {dict(args)}."
    if (result.shape, result.dtype) != (image.shape, image.dtype):
        return (
            f"{name}: must keep shape and dtype, got {image.dtype}{image.shape} -> "
            f"{result.dtype}{result.shape}. Crop and cast back inside it."
        )
    return ""
