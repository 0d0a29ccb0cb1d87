"""LeNet on MNIST, one training run for the best frontier: four nested models a step.

Command:  python -m train.main --config=configs/mnist_lenet_nested.py --workdir=runs/n
Hardware: 2 CPU cores
Time:     9 minutes
Result:   test accuracy 99.3 / 99.2 / 98.7 / 97.2 at 1 / 0.5 / 0.25 / 0.125 of the ranks
"""

from ml_collections import ConfigDict

from configs import common

FRACTIONS = (1.0, 0.5, 0.25, 0.125)


def get_config(arg: str = "") -> ConfigDict:
    """The config; "smoke" for a run of a minute."""
    smoke = common.options(arg)["smoke"]
    config = common.base(seed=0)
    config.data = common.mnist(
        batch_size=32, augment=(("random_crop", {"padding": 1}),)
    )
    config.model = {"name": "lenet", "args": {}}
    config.phases = (
        common.phase(
            name="nested",
            until={"steps": 200} if smoke else {"epochs": 12},
            sampler={"name": "matryoshka", "args": {"fractions": FRACTIONS}},
            teacher={"name": "full", "args": {"label_weight": 0.0}},
            optimizer=common.optimizer(
                "adam",
                learning_rate=4e-3,
                schedule=common.cosine(warmup_steps=20 if smoke else 600),
            ),
        ),
    )
    return config
