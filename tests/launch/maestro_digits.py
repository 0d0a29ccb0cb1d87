"""Maestro on scikit-learn's digits: a config of seconds for the sweep of its lambda."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `lasso` is lambda, `epochs` its length."""
    options = common.options(arg, lasso=1e-3, epochs=12)
    config = common.base(seed=0)
    common.digits(config, batch_size=65)
    config.model = common.named("mlp", hidden=(128, 128))
    config.rank_rules = (("head", "dense"), (".*", "full"))
    lasso = common.named("hierarchical_group_lasso", weight=options["lasso"])
    config.phases = (
        common.phase(
            name="maestro",
            until={"epochs": options["epochs"]},
            sampler=common.named("single_layer"),
            penalties=(lasso,),
            optimizer=common.optimizer("adam", learning_rate=3e-3),
            shrink={
                "every_epochs": 1,
                "every_steps": 0,
                "threshold": 1e-5,
                "multiple": 1,
                "least_share": 0.0,
            },
        ),
    )
    config.eval_every_epochs = 4
    return config
