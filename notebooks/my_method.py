"""A method of one's own in one file: a penalty, a sampler, a selector, and the config
that puts them together. notebooks/own_method.py explains it and measures it.

Command:  PYTHONPATH=. python -m train.main --config=notebooks/my_method.py
          --workdir=runs/my_method
Variants: :maestro for Maestro's sampler and lasso in the same recipe, :plain for
          neither, :weight=1e-4 for another strength of the penalty, :seed=1
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray
from ml_collections import ConfigDict

from configs import common
from lowrank_jax import linalg
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import Penalty
from lowrank_jax.ranks import Ranks
from lowrank_jax.samplers import RankSampler
from lowrank_jax.samplers.base import init_limits, ranks_at
from lowrank_jax.selection import budgets
from lowrank_jax.selection.context import Context


def priced_lasso(*, weight: float) -> Penalty:
    """Adds `weight * sum over layers and columns of (i + o) ||u_b|| ||v_b||`.

    The size of each column times the numbers that it stores: columns of large layers go
    first.
    """

    def penalty(model: nnx.Module, step: Int[Array, ""] | int = 0):
        total = jnp.float32(0)
        for factors in find_factors(model).values():
            left, right = linalg.column_norms(*factors.arrays())  # squared
            sizes = linalg.safe_sqrt(left) * linalg.safe_sqrt(right)
            total += (factors.in_size + factors.out_size) * jnp.sum(sizes)
        return weight * total

    return penalty


def descending(*, smallest: float, descent_steps: int) -> RankSampler:
    """Draws one fraction for all layers, log-uniform in a range that grows downwards.

    At first only the whole model; after `descent_steps` from `smallest` to 1, where
    each halving of the ranks is as likely as any other.
    """

    def sample(state, key: PRNGKeyArray, step: Int[Array, ""] | int):
        part = jnp.minimum(step / descent_steps, 1.0)
        fraction = smallest ** (part * jax.random.uniform(key))
        return ranks_at(fraction, state.limits), state

    return RankSampler(init_limits, sample)


def in_series(context: Context, *, measure: str, fraction: float) -> Ranks:
    """Keeps the largest product of the layers' shares of energy, within a budget.

    What one layer drops, the next cannot bring back: shares multiply. A column is worth
    what it adds to the logarithm of its layer's share, for what it costs.
    """
    costs = context.costs(measure)
    budget = budgets.check_budget(costs, context.ranks, fraction, measure)
    values = {}
    for path, columns in context.importances().items():
        kept = np.cumsum(np.square(columns[: context.ranks[path]]))
        gain = np.diff(np.log(kept)) / getattr(costs[path], measure)(1)
        values[path] = np.maximum.accumulate(gain[::-1])[::-1]  # prefixes only
    for level in np.unique(np.concatenate([[0.0], *values.values()])):
        ranks = {path: 1 + int((v >= level).sum()) for path, v in values.items()}
        if budgets.total_cost(costs, ranks, measure) <= budget:
            return ranks
    return dict.fromkeys(values, 1)


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config, of this method or of one that it is compared with."""
    options = common.options(arg, maestro=False, plain=False, weight=float, seed=0)
    steps = common.SMOKE_STEPS if options["smoke"] else 2000
    if options["plain"]:
        parts, weight = {}, 0.0
    elif options["maestro"]:
        parts, weight = {"sampler": common.named("single_layer")}, 3e-3
        lasso = "hierarchical_group_lasso"
    else:
        sizes = {"smallest": 0.02, "descent_steps": steps // 2}
        sampler = common.named("notebooks.my_method:descending", **sizes)
        parts, weight = {"sampler": sampler}, 1e-5
        lasso = "notebooks.my_method:priced_lasso"
    if options["weight"] is not None:
        weight = options["weight"]
    if parts:
        parts["penalties"] = (common.named(lasso, weight=weight),)
    config = common.base(seed=options["seed"])
    common.digits(config, batch_size=32)
    config.model = common.named("mlp", hidden=(256, 256))
    config.rank_rules = (("head", "dense"), (".*", "full"))
    config.phases = (
        common.phase(
            name="train",
            until={"steps": steps},
            optimizer=common.optimizer(
                "adamw",
                learning_rate=2e-3,
                schedule=common.cosine(warmup_steps=100),
                weight_decay=1e-4,
            ),
            **parts,
        ),
    )
    config.eval_every_epochs = config.checkpoint_every_epochs = 0
    return config
