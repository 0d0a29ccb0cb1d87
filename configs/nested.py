"""One training run for the best frontier: a model that is good at any rank.

Every step trains the whole model, the smallest size, and two sizes between them whose
ranks are drawn anew, layer by layer (`any` in configs/sizes.py).

Command:  python -m train.main --config=configs/nested.py --workdir=runs/nested
Variants: :compare for the recipe of the table of all methods; :alone=0.5 for training
          at half of the ranks alone; the words of configs/sizes.py for other steps;
          epochs=24 for another length
Hardware: 2 CPU cores
Time:     5 minutes on one core
Result:   LeNet on MNIST, test accuracy 99.3 / 99.1 / 98.8 / 98.3 at 1 / 0.5 / 0.25 /
          0.125 of the ranks, and no holes between them
"""

from ml_collections import ConfigDict

from configs import common, sizes

FRACTIONS = sizes.FRACTIONS
COMPARED = (1.0, 0.358, 0.1666, 0.0625)
"""Fractions of the comparison: all, a half, a quarter and an eighth of the MACs."""


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of a minute."""
    options = sizes.options(
        arg,
        compare=common.Option(False, "the recipe of the table of all methods"),
        epochs=common.Option(16, "length of the run"),
    )
    smoke, compare = options["smoke"], options["compare"]
    config = common.mnist_lenet()
    config.steps_per_call = 10
    # ten classes do not fit through two dimensions
    config.rank_rules = (("fc3", "dense"), (".*", sizes.rank(options)))
    step = sizes.nested(options, "all" if compare else "any")
    if compare:
        step["sampler"] = common.named("matryoshka", fractions=COMPARED)
        epochs, optimizer = common.LENET_EPOCHS, common.lenet_optimizer()
    else:
        config.data.batch_size = 32
        config.task.args.augment = (("random_crop", {"padding": 1}),)
        epochs, warmup = options["epochs"], common.SMOKE_STEPS // 5 if smoke else 600
        optimizer = common.optimizer(
            "adam", learning_rate=4e-3, schedule=common.cosine(warmup_steps=warmup)
        )
    config.phases = (
        common.phase(
            name="nested",
            until=common.length(epochs, smoke=smoke),
            optimizer=optimizer,
            **step,
        ),
    )
    return config
