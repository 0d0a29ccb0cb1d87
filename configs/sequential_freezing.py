"""Sequential freezing (Hajimolahoseini et al., 2023): one factor at a time, by epoch.

Command:  python -m train.main --config=configs/sequential_freezing.py --workdir=runs/sf
Variants: :ratio=0.5 for another rank, :cifar10 for ResNet-18
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

A dense network is factored and fine-tuned; in one epoch the u of every layer rests, in
the next the v, so that only one factor's gradient is computed.
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
    dense = "stem|head" if cifar10 else "conv1|fc3"
    rules = ((dense, "dense"), (".*", {"rank_fraction": options["ratio"]}))
    epochs = (150, 150) if cifar10 else (2, common.LENET_EPOCHS - 2)
    config.phases = (
        common.phase(
            name="pretrain",
            until=common.length(epochs[0], smoke=smoke),
            optimizer=make(constant=True),
            on_end=(common.named("factorize", rules=rules),),
        ),
        common.phase(
            name="alternate",
            until=common.length(epochs[1], smoke=smoke),
            trainable=(r"(?!.*factors/u$).*", r"(?!.*factors/v$).*"),
            optimizer=make(warmup_steps=0),
            optimizer_state="kept",
            on_end=common.NESTED,
        ),
    )
    return config
