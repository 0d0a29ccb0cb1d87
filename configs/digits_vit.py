"""A small ViT on scikit-learn's digits, nested.

Command:  python -m train.main --config=configs/digits_vit.py --workdir=runs/digits_vit
Hardware: 2 CPU cores
Time:     about 5 minutes beside other work
Result:   not tuned; the recipe is a starting point
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of half a minute."""
    smoke = common.options(arg)["smoke"]
    config = common.base(seed=0)
    common.digits(config, batch_size=64)
    config.model = {
        "name": "vit",
        "args": {
            "patch_size": 2,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_dim": 128,
            "dropout_rate": 0.1,
        },
    }
    config.rank_rules = (("patch_embedding", "dense"), (".*", "full"))
    config.phases = (
        common.phase(
            name="nested",
            until={"epochs": 1 if smoke else 60},
            sampler={"name": "sandwich", "args": {"passes": 3, "smallest": 0.125}},
            teacher={"name": "full", "args": {"target_weight": 0.5}},
            optimizer=common.optimizer(
                "adamw",
                learning_rate=2e-3,
                schedule=common.cosine(warmup_steps=100),
                weight_decay=0.05,
            ),
        ),
    )
    return config
