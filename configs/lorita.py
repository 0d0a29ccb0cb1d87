"""LoRITa (Zhang et al., 2024): products of several full-width factors under weight
decay.

Command:  python -m train.main --config=configs/lorita.py --workdir=runs/lorita
Variants: :depth=3 for three factors, :decay=1e-3 for more decay, :cifar10 for ResNet-20
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

Decay on N factors is a Schatten-2/N quasi-norm on their product, so that training makes
the weights low-rank. At the end they are multiplied back into two factors in the order
of their singular values: cut them anywhere.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `depth` counts the factors, `decay` is that on each."""
    options = common.options(
        arg,
        cifar10=common.Option(False, "ResNet-20 on CIFAR-10"),
        depth=common.Option(2, "factors of each layer"),
        decay=common.Option(float, "weight decay on the factors"),
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(20, batch_size=128) if cifar10 else common.mnist_lenet()
    config.rank_rules = ((".*", {"depth": options["depth"]}),)
    default = 5e-4 if cifar10 else 5e-3
    decay = default if options["decay"] is None else options["decay"]
    make = common.cifar10_sgd if cifar10 else common.lenet_optimizer
    config.phases = (
        common.phase(
            name="deep",
            until=common.length(200 if cifar10 else common.LENET_EPOCHS, smoke=smoke),
            optimizer=make(weight_decay=decay),
            on_end=(common.named("canonicalize"),),
        ),
    )
    return config
