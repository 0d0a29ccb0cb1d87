"""Spectral initialisation and Frobenius decay (Khodak et al., 2021).

Command:  python -m train.main --config=configs/khodak.py --workdir=runs/khodak
Variants: :ratio=0.5 for another rank, :plain for ordinary decay on the factors,
          :cifar10 for ResNet-32 of double width
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

Low-rank from the first step: factors are the SVD of a fresh dense layer, and the decay
acts on their product with the dense network's weight. The first and last layer stay
dense. On CIFAR-10 kernels fold as (k2 c) x (k1 f), as in the paper, with about a tenth
of the parameters; the schedule is Maestro's, our choice.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `ratio` is the rank of a layer as a share of its full rank."""
    options = common.options(
        arg,
        cifar10=common.Option(False, "ResNet-32 of double width on CIFAR-10"),
        plain=common.Option(False, "ordinary decay on the factors"),
        ratio=common.Option(float, "rank, as a fraction of the full one"),
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    if cifar10:
        config = common.resnet(32, batch_size=128)
        config.model["args"]["width_multiplier"] = 2
    else:
        config = common.mnist_lenet()
    default = 0.05 if cifar10 else 0.25
    ratio = default if options["ratio"] is None else options["ratio"]
    layers = {"rank_fraction": ratio}
    convolutions = ".*/(conv.*|shortcut)" if cifar10 else "conv2"
    config.rank_rules = (
        ("stem|head" if cifar10 else "conv1|fc3", "dense"),
        (convolutions, {**layers, "scheme": 1}),
        *(() if cifar10 else ((".*", layers),)),
    )
    make = common.cifar10_sgd if cifar10 else common.lenet_optimizer
    decay = make()["weight_decay"]
    config.phases = (
        common.phase(
            name="low_rank",
            until=common.length(200 if cifar10 else common.LENET_EPOCHS, smoke=smoke),
            penalties=()
            if options["plain"]
            else (common.named("frobenius_decay", weight=decay),),
            optimizer=make() if options["plain"] else make(decayed=r".*/kernel"),
            on_end=common.NESTED,
        ),
    )
    return config
