"""The run of the fault campaign: Maestro on a few digits, then nested training.

python -m train.main --config=tests/faults/config.py --workdir=runs/faults

Five seconds, most of them tracing and compiling. It does all that a run can be killed
in: ordered dropout, a group lasso, shrinking every epoch, an evaluation every epoch,
checkpoints every second step, two actions between the phases, a search at the end.
`:smoke` has an epoch and a half instead of three.
"""

from ml_collections import ConfigDict

from configs import common

DIGITS = 1437
"""Examples of scikit-learn's digits that are not test examples."""
BATCH_SIZE, STEPS_PER_EPOCH = 24, 4


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config."""
    smoke = common.options(arg)["smoke"]
    named = common.named
    config = common.base(seed=3)
    common.digits(config, batch_size=BATCH_SIZE)
    config.data["validation_examples"] = DIGITS - STEPS_PER_EPOCH * BATCH_SIZE
    config.data["eval_batch_size"] = 700
    config.model = named("mlp", hidden=(16,))
    config.log_every_steps = 1
    config.eval_every_epochs = 1
    config.eval_fractions = (1.0, 0.5)
    config.checkpoint_every_steps = 2
    config.keep_checkpoints = 3
    maestro = common.phase(
        name="maestro",
        until={"steps": STEPS_PER_EPOCH * (1 if smoke else 2)},
        sampler=named("single_layer"),
        penalties=(named("hierarchical_group_lasso", weight=0.05),),
        optimizer=common.optimizer("sgd", learning_rate=0.1, args={"momentum": 0.5}),
        shrink={
            "every_epochs": 1,
            "every_steps": 0,
            "threshold": 0.3,
            "multiple": 1,
            "least_share": 0.0,
        },
        on_end=(
            named("canonicalize"),
            named("truncate", selector=named("energy", value=0.95)),
        ),
    )
    budget = {"measure": "macs", "fraction": 0.5, "width": 2, "steps": 4}
    nested = common.phase(
        name="nested",
        until={"steps": 2 if smoke else 4},
        sampler=named("sandwich", passes=3),
        teacher=named("full", target_weight=0.5),
        optimizer=common.optimizer("adamw", learning_rate=1e-2, weight_decay=0.1),
        on_end=(named("truncate", selector=named("beam", **budget)),),
    )
    config.phases = (maestro, nested)
    return config
