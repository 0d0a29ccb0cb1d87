"""Dense training: the baseline. Cut it after an SVD (the last phase's on_end).

Command:  python -m train.main --config=configs/dense.py --workdir=runs/dense
Variants: --config=configs/dense.py:cifar10 for ResNet-18 on CIFAR-10, 300 epochs
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" and "cifar10" are words."""
    options = common.options(arg, cifar10=common.CIFAR10)
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(18, batch_size=128) if cifar10 else common.mnist_lenet()
    config.rank_rules = ((".*", "dense"),)
    config.phases = (
        common.phase(
            name="dense",
            until=common.length(300 if cifar10 else common.LENET_EPOCHS, smoke=smoke),
            optimizer=common.cifar10_sgd() if cifar10 else common.lenet_optimizer(),
            on_end=(common.named("factorize", rules=((".*", "full"),)),),
        ),
    )
    return config
