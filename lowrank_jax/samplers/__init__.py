"""Ordered dropout: samplers of ranks for nested training.

A sampler is a `RankSampler` of pure functions: `init(model) -> state`, and `sample(
state, key, step) -> (ranks, state)`, traced in the training step. Its full ranks are
the *active* ones of the model it is made for; `init` takes ranks as well. `step` counts
from the start of the phase, so a curriculum goes on over cuts.
The state is saved with the checkpoint, and carried over a cut by `keep(state, model)`,
or made anew where a sampler has none (`carry` does either). Ranks come as `{path: int32
array}`, ready for `set_ranks`: of the shape of the layer's active rank, with a trailing
batch axis for one rank per example, and with a leading axis of `passes` where a step
makes several.

A sampler whose passes run at a few ranks that are known beforehand lists them as its
`rungs`; `choose` says which of them each pass takes.
"""

from collections.abc import Callable

from lowrank_jax.samplers.base import (
    Choice,
    ModelOrRanks,
    RankSampler,
    SampledRanks,
    carry,
    ranks_of,
    table_of,
)
from lowrank_jax.samplers.draws import (
    full,
    geometric,
    independent,
    per_example,
    uniform_fraction,
)
from lowrank_jax.samplers.levels import family, matryoshka, sandwich
from lowrank_jax.samplers.pairs import single_layer
from lowrank_jax.samplers.rungs import ladder
from lowrank_jax.samplers.strata import strata

SAMPLERS: dict[str, Callable[..., RankSampler]] = {
    sampler.__name__: sampler
    for sampler in (
        full,
        single_layer,
        independent,
        geometric,
        uniform_fraction,
        sandwich,
        matryoshka,
        family,
        per_example,
        ladder,
        strata,
    )
}
"""The samplers by the name they have in configs."""

__all__ = [
    "SAMPLERS",
    "Choice",
    "ModelOrRanks",
    "RankSampler",
    "SampledRanks",
    "carry",
    "ranks_of",
    "table_of",
    *SAMPLERS,
]
