"""Pufferfish (Wang et al., 2021): a dense warm-up, then one rank ratio for most layers.

Command:  python -m train.main --config=configs/pufferfish.py --workdir=runs/pufferfish
Variants: :ratio=0.5 for another ratio, :cifar10 for ResNet-18
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

The first layers and the last one stay dense. On CIFAR-10 the published recipe: 80 of
300 epochs dense, ratio 1/4, x0.1 at epochs 150 and 225; which first layers stay dense
(the stem and the first two blocks) is our reading.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `ratio` is the rank of a layer as a share of its full rank."""
    options = common.options(
        arg,
        cifar10=common.CIFAR10,
        ratio=common.Option(0.25, "rank, as a fraction of the full one"),
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(18, batch_size=128) if cifar10 else common.mnist_lenet()
    config.rank_rules = ((".*", "dense"),)
    make = common.cifar10_sgd if cifar10 else common.lenet_optimizer
    warm_up, rest = (80, 220) if cifar10 else (2, common.LENET_EPOCHS - 2)
    dense = r"stem|blocks/[01]/.*|head" if cifar10 else "conv1|fc3"
    rules = ((dense, "dense"), (".*", {"rank_fraction": options["ratio"]}))
    late = {
        "schedule": common.steps_down(factor=0.1, at_fractions=(70 / 220, 145 / 220))
    }
    config.phases = (
        common.phase(
            name="warm_up",
            until=common.length(warm_up, smoke=smoke),
            optimizer=make(constant=True),
            on_end=(common.named("factorize", rules=rules),),
        ),
        common.phase(
            name="low_rank",
            until=common.length(rest, smoke=smoke),
            optimizer=make(warmup_steps=0, **late if cifar10 else {}),
            optimizer_state="kept",
            on_end=common.NESTED,
        ),
    )
    return config
