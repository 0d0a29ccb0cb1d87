"""Translation of Multi30k's captions from German to English; nested.

Command:  python -m train.main --config=configs/multi30k.py --workdir=runs/multi30k
Variants: `small` for a size that trains on two cores; :dense; :maestro, with lasso=4e-4
          for another lambda than 1e-4; :alone=0.5 for training at half of the ranks
          alone; :energy for sizes whose ranks keep one share of energy in all layers;
          the words of configs/sizes.py for other steps
Hardware: a GPU; :small 2 CPU cores
Time:     not run at published size; :small 22 minutes dense, 45 nested, on one core
Result:   docs/results.md, "Text"

The model of Vaswani et al. (2017) as papers on Multi30k use it: 6 + 6 layers, width
512, 8 heads, embeddings tied, 20,000 steps; `:small` 3 + 3 layers, width 128, 4 heads,
1,200 steps (4.7 epochs). 29,000 pairs to train on, 1,014 for validation, 1,000 (2016)
to test on, several to a row of 128 tokens, 16 rows a step; the vocabulary is 8,000 byte
pairs of both languages, 4,000 for `:small`.
"""

from ml_collections import ConfigDict

from configs import common, text

LENGTH = 128


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; "smoke" for a run of two minutes."""
    options = text.options(
        arg, small=common.Option(False, "a size that trains on two cores")
    )
    small = options["small"] or options["smoke"]
    config = common.base(seed=0)
    config.data = common.data(
        "sentence_pairs",
        batch_size=4 if options["smoke"] else 16,
        eval_batch_size=32,
        validation_examples=0,
        args={
            "text": "multi30k",
            "source": "de",
            "target": "en",
            "tokenizer": common.named("byte_pairs", vocab_size=4000 if small else 8000),
            "source_length": LENGTH,
            "target_length": LENGTH,
        },
    )
    config.task = common.named("translation", label_smoothing=0.1)
    config.model = common.named(
        "encoder_decoder",
        depth=3 if small else 6,
        embed_dim=128 if small else 512,
        num_heads=4 if small else 8,
        mlp_dim=512 if small else 2048,
        dropout_rate=0.1,
        tied=True,
    )
    config.rank_rules = ((".*", "dense"),)
    steps = 1200 if options["small"] else 20_000
    steps = common.SMOKE_STEPS if options["smoke"] else steps
    text.by_steps(config, 200 if small else 500)
    optimizer = common.optimizer(
        "adam",
        learning_rate=2e-3 if small else 5e-4,
        args={"b2": 0.98},
        clip_norm=1.0,
    )
    config.phases = text.phases(
        options,
        steps=steps,
        optimizer=optimizer,
        lasso=1e-4,
        warmup_share=1 / 6,  # post-norm needs it: docs/LOG.md
    )
    return config
