"""The table of rank samplers, and the layers whose ranks they draw."""

from lowrank_jax import samplers
from lowrank_jax.samplers import RankSampler

MAX_RANKS = {"a": 5, "b": 0, "c": [3, 4], "d": [[2, 0], [1, 7]]}
"""A layer, one cut to rank 0, a stack, and a stack of grouped convolutions."""
SMALL = {"a": 1, "b": 0, "c": [1, 4], "d": [[0, 0], [1, 2]]}
PROFILES = (MAX_RANKS, SMALL)
FAMILY = [(0.5, {"a": 4, "b": 0, "c": [2, 4], "d": [[1, 0], [1, 5]]})]
FJORD = (0.2, 0.4, 0.6, 0.8, 1.0)

ROWS: dict[str, RankSampler] = {
    "full": samplers.full(),
    "single_layer": samplers.single_layer(),
    "independent": samplers.independent(),
    "geometric": samplers.geometric(decay=0.7),
    "uniform_fraction": samplers.uniform_fraction(),
    "uniform_fraction, levels": samplers.uniform_fraction(fractions=FJORD),
    "sandwich": samplers.sandwich(),
    "sandwich, two": samplers.sandwich(passes=2, smallest=0.5),
    "matryoshka": samplers.matryoshka(fractions=(1.0, 0.25, 0.5)),
    "matryoshka, family": samplers.matryoshka(fractions=(1.0, 0.25), family=FAMILY),
    "family": samplers.family(profiles=PROFILES),
    "per_example": samplers.per_example(batch_size=6),
    "per_example, common": samplers.per_example(batch_size=6, common_fraction=True),
    "ladder": samplers.ladder(
        fractions=(1.0, 0.5, 0.25), chances=(0.5, 0.25, 0.25), warmup_steps=3
    ),
    "strata": samplers.strata(fractions=((0.75, 0.5), (0.25,))),
    "strata, between": samplers.strata(
        fractions=((0.75, 0.5, 0.5), (0.25,)), between="layers"
    ),
    "strata, family": samplers.strata(
        fractions=((0.75, 0.5), (0.25,)), between="layers", family=FAMILY
    ),
}
OF_LAYERS = {
    "family": lambda large, small: samplers.family(profiles=[large, small]),
    "matryoshka, family": lambda large, small: samplers.matryoshka(
        fractions=(1.0, 0.25), family=[(0.5, small)]
    ),
    "strata, family": lambda large, small: samplers.strata(
        fractions=((0.75, 0.5), (0.25,)), between="layers", family=[(0.5, small)]
    ),
}
"""Those that name layers, made anew from ranks of others, large and small ones."""
BATCH = 6
"""How many examples the samplers draw for that draw for each."""
