"""The dense models: shapes, sizes, paths, modes, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models import MODELS, convnet, lenet, mlp, vit
from train.registry import resolve

OPTIONS = {
    "convnet": {"widths": (4, 8)},
    "lenet": {},
    "mlp": {"hidden": [8, 4]},
    "vit": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12},
}


def count(model: nnx.Module) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def paths(model: nnx.Module, kind: type[nnx.Module]) -> set[str]:
    return {
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if type(module) is kind
    }


@pytest.mark.parametrize("name", MODELS)
def test_maps_images_to_finite_float32_logits_with_gradients(name):
    image_shape = (16, 20, 3)
    build = resolve("model", name, MODELS, allow_imports=[])
    model = build(
        image_shape=image_shape, num_classes=7, rngs=nnx.Rngs(0), **OPTIONS[name]
    )
    images = jax.random.normal(jax.random.key(0), (2, *image_shape))

    def loss(model, images):
        logits = model(images)
        return jnp.sum(logits**2), logits

    (_, logits), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model, images)
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_bfloat16_parameters_are_float32(name):
    build = resolve("model", name, MODELS, allow_imports=[])
    model = build(
        image_shape=(16, 16, 1), num_classes=3, rngs=nnx.Rngs(0), **OPTIONS[name]
    )
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    assert model(jnp.ones((2, 16, 16, 1), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "image_shape", "expected"),
    [
        (lenet.build, (28, 28, 1), 44_426),
        (mlp.build, (28, 28, 1), 785 * 256 + 257 * 256 + 257 * 10),
        (
            convnet.build,
            (32, 32, 3),
            9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 129 * 10,
        ),
        (
            vit.build,
            (28, 28, 1),
            # Patches, positions, 4 blocks (norms, attention, perceptron), norm, head.
            5 * 64
            + 196 * 64
            + 4 * (4 * 64 + 4 * 65 * 64 + 65 * 128 + 129 * 64)
            + 2 * 64
            + 65 * 10,
        ),
    ],
    ids=["lenet", "mlp", "convnet", "vit"],
)
def test_parameter_count_of_the_defaults(build, image_shape, expected):
    model = nnx.eval_shape(
        lambda: build(image_shape=image_shape, num_classes=10, rngs=nnx.Rngs(0))
    )
    assert count(model) == expected


def test_paths():
    kwargs = {"image_shape": (16, 16, 1), "num_classes": 3, "rngs": nnx.Rngs(0)}
    model = mlp.build(**kwargs, **OPTIONS["mlp"])
    assert paths(model, nnx.Linear) == {"hidden/0", "hidden/1", "head"}
    model = lenet.build(**kwargs)
    assert paths(model, nnx.Conv) == {"conv1", "conv2"}
    assert paths(model, nnx.Linear) == {"fc1", "fc2", "fc3"}
    model = convnet.build(**kwargs, **OPTIONS["convnet"])
    assert paths(model, nnx.Conv) == {"blocks/0/conv", "blocks/1/conv"}
    assert paths(model, nnx.BatchNorm) == {"blocks/0/norm", "blocks/1/norm"}
    assert paths(model, nnx.Linear) == {"head"}
    model = vit.build(**kwargs, **(OPTIONS["vit"] | {"depth": 1}))
    assert paths(model, nnx.Conv) == {"patch_embedding"}
    assert paths(model, nnx.MultiHeadAttention) == {"blocks/0/attention"}
    assert paths(model, nnx.LinearGeneral) == {
        f"blocks/0/attention/{name}" for name in ("query", "key", "value", "out")
    }
    assert paths(model, nnx.Linear) == {"blocks/0/up", "blocks/0/down", "head"}


def test_batch_statistics_move_in_train_mode_only():
    model = convnet.build(
        image_shape=(8, 8, 1), num_classes=3, rngs=nnx.Rngs(0), widths=(4, 8)
    )
    images = 3 + jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

    def moved(images):
        """How many running statistics change when the model sees the images."""
        before = jax.tree.leaves(jax.tree.map(np.array, nnx.state(model)))
        model(images)
        after = jax.tree.leaves(nnx.state(model))
        return sum(
            not np.array_equal(*pair) for pair in zip(before, after, strict=True)
        )

    model.eval()
    assert moved(images) == 0
    model.train()
    assert moved(images) == 4
    model.eval()
    assert moved(images) == 0
    alone, together = model(images[:1]), model(images)[:1]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_convnet_takes_tiny_images():
    model = convnet.build(image_shape=(1, 3, 2), num_classes=3, rngs=nnx.Rngs(0))
    assert np.isfinite(model(jnp.ones((2, 1, 3, 2)))).all()


def test_vit_drops_in_train_mode_only():
    model = vit.build(
        image_shape=(8, 8, 1),
        num_classes=3,
        rngs=nnx.Rngs(0),
        dropout_rate=0.5,
        **OPTIONS["vit"],
    )
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    model.train()
    assert not np.allclose(model(images), model(images))
    model.eval()
    np.testing.assert_array_equal(model(images), model(images))


def test_vit_without_dropout_holds_no_random_state():
    model = vit.build(
        image_shape=(8, 8, 1), num_classes=3, rngs=nnx.Rngs(0), **OPTIONS["vit"]
    )
    assert not paths(model, nnx.Dropout)
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))


def test_vit_knows_where_a_patch_is():
    model = vit.build(
        image_shape=(8, 8, 1), num_classes=3, rngs=nnx.Rngs(0), **OPTIONS["vit"]
    )
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    shifted = jnp.roll(images, 4, axis=1)
    assert not np.allclose(model(images), model(shifted), atol=1e-4)
    model.position_embedding.set_value(jnp.zeros_like(model.position_embedding[...]))
    np.testing.assert_allclose(model(images), model(shifted), atol=1e-4)


@pytest.mark.parametrize("side", [(15, 28), (28, 15)])
def test_lenet_refuses_small_images(side):
    with pytest.raises(ValueError, match=r"lenet: .* at least 16x16 pixels, got "):
        lenet.build(image_shape=(*side, 1), num_classes=10, rngs=nnx.Rngs(0))


def test_vit_reports_all_offenders():
    with pytest.raises(ValueError) as error:
        vit.build(
            image_shape=(28, 30, 1),
            num_classes=10,
            rngs=nnx.Rngs(0),
            patch_size=4,
            num_heads=3,
        )
    assert "vit: patch_size must divide the image's 28x30 pixels, got 4." in str(
        error.value
    )
    assert "vit: num_heads must divide embed_dim 64, got 3." in str(error.value)
