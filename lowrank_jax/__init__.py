"""Trainable low-rank layers for JAX: train once, cut at any rank.

`import lowrank_jax as lr` is all that one's own training loop needs: functions for
models here, the tables of samplers, penalties, projections and selectors in the modules
of these names.
"""

from lowrank_jax import (
    calibration,
    checkpoint,
    errors,
    layers,
    penalties,
    projections,
    samplers,
    selection,
)
from lowrank_jax.active import at_ranks, get_ranks, max_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.elastic import Elastic
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.factors import Factors
from lowrank_jax.paths import find_factors
from lowrank_jax.ranked import Rank
from lowrank_jax.selection import ranks_for
from lowrank_jax.shrinking import shrink, tail_ranks
from lowrank_jax.summary import summary
from lowrank_jax.surgery import canonicalize, merge, truncate
from lowrank_jax.version import __version__

__all__ = [
    "Elastic",
    "Factors",
    "Rank",
    "UserError",
    "__version__",
    "at_ranks",
    "calibration",
    "canonicalize",
    "checkpoint",
    "count",
    "errors",
    "factorize",
    "find_factors",
    "get_ranks",
    "layers",
    "max_ranks",
    "merge",
    "penalties",
    "projections",
    "ranks_for",
    "samplers",
    "selection",
    "set_ranks",
    "shrink",
    "summary",
    "tail_ranks",
    "truncate",
]
