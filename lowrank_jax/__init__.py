"""Trainable low-rank layers for JAX: train once, cut at any rank.

The functions for one's own training loop; everything else is in the modules.
"""

from lowrank_jax import penalties, projections, samplers
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors, Rank
from lowrank_jax.paths import find_factors
from lowrank_jax.shrinking import shrink, tail_ranks
from lowrank_jax.surgery import canonicalize, merge, truncate

__all__ = [
    "Factors",
    "Rank",
    "canonicalize",
    "count",
    "factorize",
    "find_factors",
    "get_ranks",
    "max_ranks",
    "merge",
    "penalties",
    "projections",
    "samplers",
    "set_ranks",
    "shrink",
    "tail_ranks",
    "truncate",
]
