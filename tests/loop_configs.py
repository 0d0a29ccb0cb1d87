"""Short runs that tests of the loop share: their configs, and a count of traces.

260 of the 1,437 digits are trained on in batches of 65, so an epoch has 4 steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import support

from configs import common
from lowrank_jax import penalties
from lowrank_jax.paths import find_factors
from train import checks, phases
from train.config import to_json
from train.run import open_run

BATCH_SIZE = 65
MODELS = {
    "mlp": {"hidden": (16,)},
    "convnet": {"widths": (4, 4)},
    "vit": {
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 2,
        "mlp_dim": 8,
        "dropout_rate": 0.1,
    },
}
SGD = common.optimizer("sgd", learning_rate=0.1, args={"momentum": 0.5})
named = common.named


def phase(until: int, *, name: str = "only", **changes: Any) -> dict[str, Any]:
    """A phase of so many steps; plain training of the factors unless changed."""
    values = {"optimizer": SGD, **changes}
    return common.phase(name=name, until={"steps": until}, **values)


def make_config(*of_phases: dict[str, Any], model: str = "mlp", **changes: Any):
    """A config that is evaluated each epoch."""
    choice = {"name": model, "args": MODELS[model]}
    changes = {"eval_every_epochs": 1, **changes}
    return support.make_config(*of_phases, model=choice, **changes)


# Two phases, both with shrinking in reach: Maestro's, then a nested one.

TRACES: list[tuple[str, tuple[int, ...]]] = []


def count_traces(*, tag: str) -> penalties.Penalty:
    """No penalty at all: notes each trace of the step, with the allocated ranks."""

    def penalty(model, step=0):
        if isinstance(step, jax.core.Tracer):
            layers = find_factors(model).values()
            TRACES.append((tag, tuple(factors.max_rank for factors in layers)))
        return jnp.float32(0)

    return penalty


def traces_of_checks(config: dict[str, Any]) -> int:
    """How many of them come from the check before the first step."""
    run, before = open_run(to_json(config)), len(TRACES)
    plan = phases.build_phases(run.config["phases"])
    checks.check_phases(run, plan, run.fresh_model())
    count = len(TRACES) - before
    del TRACES[before:]
    return count


def counter(tag: str) -> dict[str, Any]:
    return named("count_traces", tag=tag)


def lasso(weight: float) -> dict[str, Any]:
    return named("hierarchical_group_lasso", weight=weight)


SHRINK = {
    "every_epochs": 1,
    "every_steps": 0,
    "threshold": 0.3,
    "multiple": 1,
    "least_share": 0.0,
}


def two_phases(weight: float = 0.05) -> Any:
    adam = common.optimizer(
        "adamw",
        learning_rate=1e-2,
        schedule=common.cosine(warmup_steps=2),
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return make_config(
        phase(
            8,
            name="maestro",
            sampler=named("single_layer"),
            penalties=(lasso(weight), counter("maestro")),
            shrink=SHRINK,
        ),
        phase(
            4,
            name="nested",
            sampler=named("sandwich", passes=3),
            teacher=named("full", target_weight=0.5),
            penalties=(counter("nested"),),
            optimizer=adam,
        ),
    )
