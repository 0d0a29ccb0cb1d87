"""Parameters and MACs of the dense models, as the literature counts them."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lowrank_jax import counting, factorization
from lowrank_jax.active import max_ranks
from train.models import convnet, lenet, mlp, resnet, vgg, vit


def count(model: nnx.Module) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


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


def full_rank_cost(build, image_shape, num_classes, **options):
    """The cost of a model with every layer factored, and its full ranks."""
    model = nnx.eval_shape(
        lambda: factorization.factorize(
            build(
                image_shape=image_shape,
                num_classes=num_classes,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
    )
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return counting.count(model, images), max_ranks(model)


@pytest.mark.parametrize(
    ("build", "options", "image_shape", "num_classes", "dense", "factored"),
    [
        (
            resnet.build,
            {},
            (32, 32, 3),
            10,
            (11_173_962, 555_422_720, "555.42 M"),
            (12_653_447, 626_423_908, "626.42 M"),
        ),
        (
            vgg.build,
            {},
            (32, 32, 3),
            10,
            (20_040_522, 398_136_320, "398.14 M"),
            (22_437_511, 449_214_564, "449.21 M"),
        ),
        (
            resnet.build,
            {"depth": 50, "stem": "7x7"},
            (224, 224, 3),
            1000,
            (25_557_032, 4_089_184_256, "4.089 G"),
            (31_713_896, 5_040_718_400, "5.041 G"),
        ),
    ],
    ids=["resnet18", "vgg19", "resnet50"],
)
def test_counts_of_the_literature(
    build, options, image_shape, num_classes, dense, factored
):
    """Maestro's: conv and linear layers, the stem and the head factored as well."""
    cost, ranks = full_rank_cost(build, image_shape, num_classes, **options)

    def rounded(macs):
        return f"{macs / 1e6:.2f} M" if macs < 1e9 else f"{macs / 1e9:.3f} G"

    layers = [(layer, ranks[path]) for path, layer in cost.layers.items()]
    params = cost.fixed_params + sum(one.factored_params(rank) for one, rank in layers)
    macs = cost.fixed_macs + sum(one.factored_macs(rank) for one, rank in layers)
    assert cost.fixed_macs == 0  # nothing stays dense
    assert (cost.dense_params, cost.dense_macs, rounded(cost.dense_macs)) == dense
    assert (params, macs, rounded(macs)) == factored


@pytest.mark.parametrize(
    ("depth", "multiplier", "params", "macs"),
    [
        (20, 1, 272_474, 40_813_184),
        (32, 1, 466_906, 69_124_736),
        (32, 2, 1_860_522, 275_612_928),
        (56, 1, 855_770, 125_747_840),
    ],
)
def test_counts_of_the_cifar_resnets(depth, multiplier, params, macs):
    n, w = (depth - 2) // 6, 16 * multiplier
    # Kernels: within a stage, into a stage with its shortcut; 32x32, 16x16, 8x8 pixels.
    first = 9 * 3 * w + 2 * n * 9 * w**2
    second = 9 * 2 * w**2 + (2 * n - 1) * 9 * (2 * w) ** 2 + 2 * w**2
    third = 9 * 8 * w**2 + (2 * n - 1) * 9 * (4 * w) ** 2 + 8 * w**2
    norms = 2 * ((1 + 2 * n) * w + (2 * n + 1) * 2 * w + (2 * n + 1) * 4 * w)
    assert params == first + second + third + norms + 4 * w * 10 + 10
    assert macs == 1024 * first + 256 * second + 64 * third + 4 * w * 10
    cost, _ = full_rank_cost(
        resnet.build, (32, 32, 3), 10, depth=depth, width_multiplier=multiplier
    )
    assert (cost.dense_params, cost.dense_macs) == (params, macs)
