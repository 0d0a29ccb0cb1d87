"""Cuttlefish (Wang et al., 2023): dense until the stable ranks stand still, then
low-rank at them.

Command:  python -m train.main --config=configs/cuttlefish.py --workdir=runs/cuttlefish
Variants: :cifar10 for ResNet-18
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

The switch comes when no layer's stable rank moves any more, at half the run at the
latest; each layer's rank is its stable rank, scaled so that a fresh layer has full
rank. The first and last layer stay dense, and those that would not have fewer MACs
(the paper times them). The momentum goes over to the factors by the chain rule.
Measured every 50 steps here, where the paper has once an epoch: its tolerance of 0.1 is
per measurement. On CIFAR-10 the learning rate, and how it falls in the second phase,
are our choice.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" and "cifar10" are words."""
    options = common.options(arg, cifar10=common.CIFAR10)
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(18, batch_size=128) if cifar10 else common.mnist_lenet()
    config.rank_rules = ((".*", "dense"),)
    total = 300 if cifar10 else common.LENET_EPOCHS
    first = "stem" if cifar10 else "conv1"
    last = "head" if cifar10 else "fc3"
    rules = ((f"{first}|{last}", "dense"), (".*", "full"))
    make = common.cifar10_sgd if cifar10 else common.lenet_optimizer
    still = common.named(
        "stable_ranks_stand_still",
        every_steps=351 if cifar10 else 5 if smoke else 50,
        window=15,
        points=11,
        tolerance=0.1,
    )
    config.phases = (
        common.phase(
            name="dense",
            until=common.length(total // 2, smoke=smoke) | {"condition": still},
            optimizer=make(constant=True),
            on_end=(common.named("factorize_at_stable_rank", rules=rules),),
        ),
        common.phase(
            name="low_rank",
            until={"steps": common.SMOKE_STEPS} if smoke else {"to_epoch": total},
            optimizer=make(warmup_steps=0),
            optimizer_state="kept",
            on_end=common.NESTED,
        ),
    )
    return config
