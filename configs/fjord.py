"""FjORD (Horvath et al., 2021): one fraction for all layers, distilled from the full
model.

Command:  python -m train.main --config=configs/fjord.py --workdir=runs/fjord
Variants: :cifar10 for ResNet-18
Hardware: 2 CPU cores
Time:     3 minutes on one core, beside other work
Result:   small BatchNorm network on MNIST, test accuracy 96.5 / 96.1 / 95.2 / 93.0 /
          71.9 at 1 / 0.8 / 0.6 / 0.4 / 0.2 of the ranks, with BatchNorm of every size

Each step trains the full model on the labels, and the model at a random one of five
fractions on the full model's softmax. The network has BatchNorm: every size is
evaluated with statistics of its own, as are cut checkpoints with `--recalibrate`.
"""

from ml_collections import ConfigDict

from configs import common

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" and "cifar10" are words."""
    options = common.options(arg, cifar10=common.CIFAR10)
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(18, batch_size=128) if cifar10 else common.mnist_lenet()
    if not cifar10:
        config.model = common.named("convnet", widths=(8, 16, 32))
    config.eval_fractions = FRACTIONS[::-1]
    config.recalibration_batches = 20
    config.phases = (
        common.phase(
            name="fjord",
            until=common.length(300 if cifar10 else common.LENET_EPOCHS, smoke=smoke),
            sampler=common.named("uniform_fraction", fractions=FRACTIONS),
            teacher=common.named("full", target_weight=0.0),
            optimizer=common.cifar10_sgd() if cifar10 else common.lenet_optimizer(),
        ),
    )
    return config
