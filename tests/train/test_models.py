"""The dense models: shapes, sizes, paths, modes, errors."""

import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models import MODELS, convnet, lenet, mlp, norms, resnet, vgg, vit
from train.models.pooling import max_pool_2x2
from train.registry import resolve

OPTIONS = {
    "convnet": {"widths": (4, 8)},
    "lenet": {},
    "mlp": {"hidden": [8, 4]},
    "resnet": {"depth": 20, "width_multiplier": 0.25},
    "vgg": {"depth": 11, "width_multiplier": 0.0625},
    "vit": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12},
}


def paths(model: nnx.Module, kind: type[nnx.Module]) -> set[str]:
    return {
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if type(module) is kind
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_maps_images_to_finite_float32_logits_with_gradients(name):
    image_shape = (32, 36, 3)
    build = resolve(name, MODELS, allow_imports=[])
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


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_stand_in_build_alone(name):
    """So that the one signature says, and a checkpoint can record, what a model is."""
    build = resolve(name, MODELS, allow_imports=[])
    module = sys.modules[build.__module__]
    required = {"image_shape", "num_classes", "rngs"}
    options = inspect.signature(build).parameters
    assert {n for n, p in options.items() if p.default is p.empty} == required
    assert {p.kind for p in options.values()} == {inspect.Parameter.KEYWORD_ONLY}
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == build.__module__:
            parameters = inspect.signature(kind.__init__).parameters.values()
            assert not [p.name for p in parameters if p.default is not p.empty]


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_of_bfloat16_parameters_are_float32(name):
    build = resolve(name, MODELS, allow_imports=[])
    model = build(
        image_shape=(32, 32, 1), num_classes=3, rngs=nnx.Rngs(0), **OPTIONS[name]
    )
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    assert model(jnp.ones((2, 32, 32, 1), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "depth"),
    [(resnet.build, depth) for depth in resnet.DEPTHS]
    + [(vgg.build, depth) for depth in vgg.DEPTHS],
    ids=[f"resnet{d}" for d in resnet.DEPTHS] + [f"vgg{d}" for d in vgg.DEPTHS],
)
def test_every_depth_maps_images_to_logits(build, depth):
    image_shape = (48, 33, 3)
    logits = nnx.eval_shape(
        lambda images: build(
            image_shape=image_shape, num_classes=7, rngs=nnx.Rngs(0), depth=depth
        )(images),
        jax.ShapeDtypeStruct((2, *image_shape), jnp.float32),
    )
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_paths():
    kwargs = {"image_shape": (16, 16, 1), "num_classes": 3, "rngs": nnx.Rngs(0)}
    model = mlp.build(**kwargs, **OPTIONS["mlp"])
    assert paths(model, nnx.Linear) == {"hidden/0", "hidden/1", "head"}
    model = lenet.build(**kwargs)
    assert paths(model, nnx.Conv) == {"conv1", "conv2"}
    assert paths(model, nnx.Linear) == {"fc1", "fc2", "fc3"}
    model = convnet.build(**kwargs, **OPTIONS["convnet"])
    assert paths(model, nnx.Conv) == {"blocks/0/conv", "blocks/1/conv"}
    assert paths(model, norms.BatchNorm) == {"blocks/0/norm", "blocks/1/norm"}
    assert paths(model, nnx.Linear) == {"head"}
    model = nnx.eval_shape(
        lambda: resnet.build(**(kwargs | {"rngs": nnx.Rngs(0), "depth": 50}))
    )
    layers = {f"blocks/{block}/conv{n}" for block in range(16) for n in (1, 2, 3)}
    layers |= {f"blocks/{block}/shortcut" for block in (0, 3, 7, 13)}
    assert paths(model, nnx.Conv) == layers | {"stem"}
    assert paths(model, nnx.Linear) == {"head"}
    kwargs["image_shape"] = (32, 32, 1)
    model = vgg.build(**kwargs, **OPTIONS["vgg"])
    assert paths(model, nnx.Conv) == {f"blocks/{block}/conv" for block in range(8)}
    assert paths(model, norms.BatchNorm) == {
        f"blocks/{block}/norm" for block in range(8)
    }
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


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_group_normalization_holds_no_batch_statistics(name):
    model = resolve(name, MODELS, allow_imports=[])(
        image_shape=(32, 32, 3),
        num_classes=7,
        rngs=nnx.Rngs(0),
        norm="group",
        groups=2,
        **OPTIONS[name],
    )
    assert paths(model, norms.GroupNorm) and not paths(model, norms.BatchNorm)
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    call = nnx.jit(lambda model, images: model(images))
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    model.train()
    logits = call(model, images)
    assert logits.shape == (2, 7) and np.isfinite(logits).all()
    model.eval()
    np.testing.assert_allclose(call(model, images), logits, rtol=1e-6)


def test_groups_are_at_most_the_channels():
    model = nnx.eval_shape(
        lambda: resnet.build(
            image_shape=(32, 32, 3),
            num_classes=7,
            rngs=nnx.Rngs(0),
            depth=20,
            norm="group",
        )
    )
    assert model.stem_norm.num_groups == 16
    assert model.blocks[-1].norm2.num_groups == 32


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_resnet_strides_start_at_the_first_pixel(block):
    """As in PyTorch; "SAME" would start at the second one of an even side."""

    def call(stride, images):
        one = block(3, 4, stride, lambda _: lambda x: x, rngs=nnx.Rngs(0))
        conv = one.conv1 if block is resnet.BasicBlock else one.conv2
        inputs = jnp.tile(images, 2)[..., : conv.in_features]
        return one(images).shape, conv(inputs), one.shortcut(images)

    images = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))
    shape, *dense = call(1, images)
    assert shape == (2, 6, 8, 4 * block.expansion)
    shape, *strided = call(2, images)
    assert shape == (2, 3, 4, 4 * block.expansion)
    for every, second in zip(dense, strided, strict=True):
        np.testing.assert_allclose(every[:, ::2, ::2], second, rtol=1e-4, atol=1e-5)


def test_resnet_block_without_branch_is_relu():
    """The shortcut is the identity where the shapes agree, and it is not scaled."""
    model = resnet.BasicBlock(3, 3, 1, lambda _: lambda x: 0 * x, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    assert model.shortcut is None
    np.testing.assert_array_equal(model(images), nnx.relu(images))


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_pooling_is_that_of_flax(shape):
    """Its gradient too; odd sides lose their last row."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = rng.normal(size=(2, shape[1] // 2, shape[2] // 2, 3)).astype(np.float32)

    def both(pool):
        gradient = jax.grad(lambda images: jnp.sum(weights * pool(images)))(images)
        return pool(images), gradient

    found = both(max_pool_2x2)
    expected = both(lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_resnet_pools_after_the_large_stem():
    model = resnet.build(
        image_shape=(20, 12, 3),
        num_classes=3,
        rngs=nnx.Rngs(0),
        stem="7x7",
        width_multiplier=0.125,
    )
    model.blocks, model.head = nnx.List([]), lambda features: features
    model.eval()
    images = jax.random.normal(jax.random.key(0), (2, 20, 12, 3))
    stem = nnx.relu(model.stem_norm(model.stem(images)))
    assert stem.shape == (2, 10, 6, 8)
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    pooled = windows[:, ::2, ::2].max(axis=(-2, -1))
    assert pooled.shape == (2, 5, 3, 8)
    np.testing.assert_allclose(model(images), pooled.mean(axis=(1, 2)), rtol=1e-5)


def test_kernels_start_kaiming_normal():
    rngs = nnx.Rngs(0)
    basic = resnet.BasicBlock(64, 128, 1, lambda _: lambda x: x, rngs=rngs)
    block = vgg.ConvBlock(64, 128, True, norm="batch", groups=32, rngs=rngs)
    for conv in (basic.conv1, block.conv):
        kernel = np.asarray(conv.kernel[...])
        np.testing.assert_allclose(kernel.std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)
        assert np.abs(kernel).max() > 4 * kernel.std()  # not truncated


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


@pytest.mark.parametrize(
    ("build", "options", "messages"),
    [
        (
            resnet.build,
            {"depth": 19},
            [r"depth must be one of \[8, 18, 20, 32, 50, 56\]"],
        ),
        (
            resnet.build,
            {"stem": "5x5", "norm": "layer", "width_multiplier": 0.3},
            ["stem must be", "norm must be", "width_multiplier .* got 0.3, hence"],
        ),
        (
            resnet.build,
            {"norm": "group", "groups": 48},
            [r"groups must .* got 48 for the widths \[64, 128, 256, 512\]"],
        ),
        # The widths 4 to 32 are fewer than the groups, the outputs of 64 are not.
        (
            resnet.build,
            {"depth": 50, "norm": "group", "groups": 48, "width_multiplier": 0.0625},
            ["groups must .* got 48"],
        ),
        (
            vgg.build,
            {"image_shape": (8, 31, 3), "depth": 12, "norm": "layer"},
            [r"at least 32x32 pixels, got 8x31", "depth must be", "norm must be"],
        ),
        (vgg.build, {"width_multiplier": 0}, ["width_multiplier .* got 0, hence"]),
        (vgg.build, {"norm": "group", "groups": 0}, ["groups must .* got 0 for"]),
    ],
)
def test_resnet_and_vgg_report_all_offenders(build, options, messages):
    kwargs = {"image_shape": (32, 32, 3), "num_classes": 10, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError) as error:
        build(**(kwargs | options))
    lines = str(error.value).splitlines()
    assert len(lines) == len(messages)
    name = build.__module__.rpartition(".")[2]
    for message in messages:
        assert any(re.search(f"{name}: .*{message}", line) for line in lines), message
