"""ResNet-8 on 10,000 images of CIFAR-10: four nested models from one run, where data is
short and the network is small.

Command:  python -m train.main --config=configs/resnet8.py --workdir=runs/resnet8
Variants: :batch for BatchNorm in the place of GroupNorm; :dense; :alone=0.5 for
          training at half of the ranks alone; the words of configs/sizes.py for other
          steps
Hardware: 2 CPU cores
Time:     10 minutes on one core
Result:   one seed, held out: 60 / 56 / 50 / 40 % at 1 / 0.5 / 0.25 / 0.125 of the
          ranks; trained for one size alone 58 / 58 / 54 / 44; with BatchNorm ten
          points more for all

Half of the epochs are dense: nested from the start, every size is worse.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common, sizes

EPOCHS = 20
DENSE_SHARE = 0.5
"""Of the epochs, before the layers are factorized."""


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of a minute."""
    options = sizes.options(
        arg,
        batch=common.Option(False, "BatchNorm in the place of GroupNorm"),
        dense=common.Option(False, "dense, under the same recipe"),
    )
    smoke = options["smoke"]
    config = common.base(seed=0)
    common.cifar10(config, batch_size=64)
    config.data.train_examples = 10_000
    norm = {"norm": "batch"} if options["batch"] else {"norm": "group", "groups": 8}
    config.model = common.named("resnet", depth=8, **norm)
    config.rank_rules = ((".*", "dense"),)
    config.eval_every_epochs = config.checkpoint_every_epochs = 5
    config.eval_fractions = sizes.FRACTIONS if sizes.is_nested(options) else (1.0,)
    config.recalibration_batches = 20 if options["batch"] else 0
    warmup_steps = common.SMOKE_STEPS // 5 if smoke else 300
    cosine = common.cosine(warmup_steps=warmup_steps)
    if options["dense"]:
        config.phases = (
            common.phase(
                name="train",
                until=common.length(EPOCHS, smoke=smoke),
                optimizer=_adam(4e-3, cosine),
            ),
        )
        return config
    first = round(DENSE_SHARE * EPOCHS)
    # ten classes do not fit through two dimensions
    rules = (("head", "dense"), (".*", sizes.rank(options)))
    config.phases = (
        common.phase(
            name="warm_up",
            until=common.length(first, smoke=smoke),
            optimizer=_adam(4e-3, common.named("constant", warmup_steps=warmup_steps)),
            on_end=(common.named("factorize", rules=rules),),
        ),
        common.phase(
            name="low_rank",
            until=common.length(EPOCHS - first, smoke=smoke),
            optimizer=_adam(2e-3, cosine),
            **sizes.nested(options, "parts"),
        ),
    )
    return config


def _adam(learning_rate: float, schedule: Mapping[str, Any]) -> dict[str, Any]:
    return common.optimizer("adam", learning_rate=learning_rate, schedule=schedule)
