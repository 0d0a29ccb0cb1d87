"""A language model of tiny Shakespeare, by characters; nested.

Command:  python -m train.main --config=configs/shakespeare.py --workdir=runs/text
Variants: `cpu` for a size that trains on two cores; :dense; :maestro, with lasso=4e-4
          for another lambda than 1e-4; :alone=0.5 for training at half of the ranks
          alone; :uniform for sizes of one fraction of every rank; the words of
          configs/sizes.py for other steps; :byte_pairs=512 for that many byte pairs
          instead of characters
Hardware: a GPU; :cpu 2 CPU cores
Time:     not run at full size; :cpu 2 minutes dense, 4 nested, on one core
Result:   docs/results.md, "Text"; the recipe's search in docs/LOG.md

Model, data and recipe are nanoGPT's (Karpathy, 2022): 6 layers, width 384, 6 heads,
context 256, dropout 0.2, 5,000 steps of batch 64; `:cpu` 4 layers, width 128, 4 heads,
context 64, no dropout, 2,000 steps of batch 12, at four times nanoGPT's learning rate
(validation loss 1.74; 1.88 at nanoGPT's). The text is 1,003,854 characters to train on,
55,770 for validation and 55,770 to test on.
"""

from ml_collections import ConfigDict

from configs import common, text


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of a minute."""
    options = text.options(
        arg,
        cpu=common.Option(False, "a size that trains on two cores"),
        byte_pairs=common.Option(int, "so many byte pairs in the place of characters"),
    )
    vocab_size = options["byte_pairs"]
    small = options["cpu"] or options["smoke"]
    config = common.base(seed=0)
    context = 64 if small else 256
    config.data = common.data(
        "text_windows",
        batch_size=12 if small else 64,
        eval_batch_size=8192 // context,
        validation_examples=0,
        args={
            "text": "tiny_shakespeare",
            "tokenizer": common.named("characters")
            if vocab_size is None
            else common.named("byte_pairs", vocab_size=vocab_size),
            "context": context,
            "stride": 1,
        },
    )
    config.task = common.named("language_model")
    config.model = common.named(
        "transformer",
        depth=4 if small else 6,
        embed_dim=128 if small else 384,
        num_heads=4 if small else 6,
        mlp_dim=512 if small else 1536,
        dropout_rate=0.0 if small else 0.2,
        positions="learned",
        tied=True,
        use_bias=False,
        scan=False,
    )
    config.rank_rules = ((".*", "dense"),)
    text.by_steps(config, 250)
    steps = 2000 if options["cpu"] else 5000
    steps = common.SMOKE_STEPS if options["smoke"] else steps
    optimizer = common.optimizer(
        "adamw",
        learning_rate=4e-3 if small else 1e-3,
        args={"b2": 0.99},
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.phases = text.phases(
        options,
        steps=steps,
        optimizer=optimizer,
        lasso=1e-4,
        step="parts",
        by_energy=True,
    )
    return config
