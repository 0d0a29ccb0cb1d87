"""MLP on scikit-learn's digits, nested: the quickstart.

Command:  python -m train.main --config=configs/digits_mlp.py --workdir=runs/digits_mlp
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The config; "smoke" for a run of seconds."""
    smoke = common.options(arg)["smoke"]
    config = common.base(seed=0)
    config.data = common.digits(batch_size=32)
    config.model = {"name": "mlp", "args": {"hidden": (256, 256)}}
    config.phases = (
        common.phase(
            name="nested",
            until={"epochs": 2 if smoke else 60},
            sampler={"name": "sandwich", "args": {"passes": 4, "smallest": 0.05}},
            teacher={"name": "full", "args": {"label_weight": 0.5}},
            optimizer=common.optimizer(
                "adamw",
                learning_rate=2e-3,
                schedule=common.cosine(warmup_steps=100),
                weight_decay=0.05,
            ),
        ),
    )
    return config
