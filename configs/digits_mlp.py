"""MLP on scikit-learn's digits, nested: the quickstart.

Command:  python -m train.main --config=configs/digits_mlp.py --workdir=runs/digits_mlp
Hardware: 2 CPU cores
Time:     13 s of CPU time
Result:   test accuracy 97.5 with all ranks, 96.3 with a quarter of the parameters, 92.9
          with a seventh, mean of three seeds (docs/results.md)
"""

from ml_collections import ConfigDict

from configs import common

FRACTIONS = (1.0, 0.25, 0.125, 0.0625)


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of seconds."""
    smoke = common.options(arg)["smoke"]
    config = common.base(seed=0)
    common.digits(config, batch_size=32)
    config.model = {"name": "mlp", "args": {"hidden": (256, 256)}}
    # Ten classes do not fit through two dimensions: the head stays dense.
    config.rank_rules = (("head", "dense"), (".*", "full"))
    config.phases = (
        common.phase(
            name="nested",
            until={"epochs": 2 if smoke else 50},
            # the whole model on the whole batch, each smaller one on a quarter of it
            sampler=common.named("matryoshka", fractions=FRACTIONS),
            sizes="static",
            pass_parts=4,
            teacher=common.named("full", target_weight=0.0),
            optimizer=common.optimizer(
                "adamw",
                learning_rate=8e-3,
                schedule=common.cosine(warmup_steps=50),
                weight_decay=0.3,
            ),
        ),
    )
    config.steps_per_call = 10
    config.eval_fractions = FRACTIONS
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 20
    return config
