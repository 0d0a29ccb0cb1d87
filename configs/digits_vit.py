"""A small ViT on scikit-learn's digits: dense first, then four sizes in every step.

Command:  python -m train.main --config=configs/digits_vit.py --workdir=runs/digits_vit
Variants: :dense for the same epochs dense, to be cut afterwards
Hardware: 2 CPU cores
Time:     2 minutes of CPU
Result:   test accuracy 93.3 whole, 91.7 at half of the ranks, 86.1 at a quarter, 59.2
          at an eighth; cut from :dense 94.4, 72.2, 27.2, 10.0 (seed 0, notebooks)

Crops keep 1,300 images from being learned by heart. The 40 dense epochs come first as
transformers that are low-rank from the start learn late to attend (docs/LOG.md).
"""

from ml_collections import ConfigDict

from configs import common, sizes

RULES = (("patch_embedding", "dense"), (".*", "full"))


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of half a minute."""
    options = common.options(arg, dense=False)
    lengths = {"epochs": 1} if options["smoke"] else {}
    config = common.base(seed=0)
    common.digits(config, batch_size=64)
    config.task.args.augment = (("random_crop", {"padding": 1}),)
    config.model = common.named(
        "vit",
        patch_size=2,
        embed_dim=64,
        depth=2,
        num_heads=4,
        mlp_dim=128,
        dropout_rate=0.0,
    )
    config.rank_rules = ((".*", "dense"),)
    optimizer = common.optimizer(
        "adamw",
        learning_rate=2e-3,
        schedule=common.cosine(warmup_steps=50, final_fraction=0.05),
        weight_decay=0.05,
    )
    dense = common.phase(
        name="dense",
        until={"epochs": 40, **lengths},
        optimizer=optimizer,
        on_end=(common.named("factorize", rules=RULES),),
    )
    nested = common.phase(
        name="nested",
        until={"epochs": 60, **lengths},
        optimizer=optimizer,
        teacher=common.named("full", target_weight=0.0),
        **sizes.STEPS["all"],
    )
    if options["dense"]:
        dense = {**dense, "until": {"epochs": 100, **lengths}, "on_end": ()}
    config.phases = (dense,) if options["dense"] else (dense, nested)
    config.eval_every_epochs = config.checkpoint_every_epochs = 20
    return config
