"""Augmentations keep shape and dtype, follow their key and refuse bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data.augmentation import (
    AUGMENTATIONS,
    make_augment,
    random_crop,
    random_flip,
)

ARGS = {"random_crop": {"padding": 2}, "random_flip": {}}


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(1, 256, (64, 8, 6, 3))
    return jnp.asarray(pixels, jnp.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_contract(name, images):
    augment = make_augment([(name, ARGS[name])])
    result = augment(jax.random.key(0), images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(jax.jit(augment)(jax.random.key(0), images), result)
    assert not np.array_equal(augment(jax.random.key(1), images), result)


def test_crop_moves_each_image_by_at_most_its_padding(images):
    padding = 2
    result = np.asarray(random_crop(jax.random.key(0), images, padding=padding))
    padded = np.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    offsets = set()
    for before, after in zip(padded, result, strict=True):
        found = [
            (x, y)
            for x in range(2 * padding + 1)
            for y in range(2 * padding + 1)
            if np.array_equal(before[x : x + 8, y : y + 6], after)
        ]
        assert len(found) == 1
        offsets.update(found)
    assert {x for x, _ in offsets} == {y for _, y in offsets} == set(range(5))


def test_flip_mirrors_about_half_of_the_images(images):
    result = np.asarray(random_flip(jax.random.key(0), images))
    same = (result == images).all((1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_no_augmentation_is_the_identity(images):
    np.testing.assert_array_equal(make_augment([])(jax.random.key(0), images), images)


def test_equal_augmentations_draw_different_numbers(images):
    once = make_augment([("random_flip", {})])(jax.random.key(0), images)
    twice = make_augment([("random_flip", {})] * 2)(jax.random.key(0), images)
    assert not np.array_equal(once, twice)
    assert not np.array_equal(twice, images)


def test_all_mistakes_are_reported_when_building():
    with pytest.raises(ValueError) as caught:
        make_augment(
            [
                ("random_crop", {"padding": 0}),
                ("random_flip", {}),
                ("random_flip", {"axis": 1}),
                ("mixup", {}),
                ("random_crop", {}),
                ["random_crop", 3],
                "random_flip",
                [{}, {}],
            ]
        )
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        f"augment[{i}]" for i in (0, 2, 3, 4, 5, 6, 7)
    ]
    assert "random_crop" in lines[2] and "random_flip" in lines[2]


def test_an_augmentation_that_changes_the_dtype_is_refused(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "scale", lambda key, images: images / 255)
    with pytest.raises(ValueError, match="must keep shape and dtype"):
        make_augment([("scale", {})])
