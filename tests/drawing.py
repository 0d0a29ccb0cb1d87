"""Many draws of a rank sampler in one compiled scan, and how likely counts are."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.samplers import RankSampler


def draws(sampler: RankSampler, ranks, number: int, *, state=None, start: int = 0):
    """Ranks of many steps, `{path: (number, ...)}`, carrying the state as a run does.

    Args:
      sampler: What draws.
      ranks: The model, or its ranks, for a new state.
      number: How many steps.
      state: Instead of a new one.
      start: The first step.
    """

    def body(state, inputs):
        drawn, state = sampler.sample(state, *inputs)
        return state, drawn

    state = sampler.init(ranks) if state is None else state
    keys, steps = jax.random.split(jax.random.key(0), number), jnp.arange(number)
    run = jax.jit(lambda state, inputs: jax.lax.scan(body, state, inputs))
    _, drawn = run(state, (keys, start + steps))
    return {path: np.asarray(rank) for path, rank in drawn.items()}


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom: near 1 if the chances are
    right."""
    expected = counts.sum() * chances
    return float(np.sum((counts - expected) ** 2 / expected) / (len(counts) - 1))
