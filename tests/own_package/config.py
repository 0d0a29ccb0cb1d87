"""A linear map of singular values 3, 2 and 1, learned by sampled prefixes.

Command:  PYTHONPATH=tests python -m train.main --config=tests/own_package/config.py
          --workdir=runs/linear_map
Variants: :control without sampling, where no order is learned
"""

from ml_collections import ConfigDict

from configs import common

SPECTRUM = (3.0, 2.0, 1.0)
SHAPE = (8, 6)
SEED = 0


def get_config(arg: str = "") -> ConfigDict:
    """The config; "smoke" for a few steps."""
    options = common.options(arg, control=False)
    config = common.base(seed=0)
    config.data = common.data(
        "own_package.data:linear_map",
        batch_size=128,
        validation_examples=512,
        args={"spectrum": SPECTRUM, "shape": SHAPE, "examples": 8192, "seed": SEED},
    )
    config.task = common.named("own_package.task:regression", noise=0.0)
    config.model = common.named("own_package.model:build")
    config.phases = (
        common.phase(
            name="prefixes",
            until={"steps": 20 if options["smoke"] else 1000},
            sampler=common.named("full" if options["control"] else "uniform_fraction"),
            optimizer=common.optimizer(
                "sgd", learning_rate=0.3, schedule=common.cosine(warmup_steps=0)
            ),
        ),
    )
    # Ranks 6 to 1.
    config.eval_fractions = tuple(rank / SHAPE[1] for rank in range(SHAPE[1], 0, -1))
    config.eval_every_epochs = config.checkpoint_every_epochs = 0
    return config
