"""Rank selection: curves of what a rank costs and loses, solvers from them to ranks,
and the selectors that have a name."""

from lowrank_jax.selection import (
    activations,
    budgets,
    choosing,
    curves,
    knapsack,
    search,
    selectors,
    solvers,
    spectral,
    tails,
)
from lowrank_jax.selection.choosing import choose, context_of, ranks_for
from lowrank_jax.selection.context import Context
from lowrank_jax.selection.selectors import SELECTORS, Selector

__all__ = [
    "SELECTORS",
    "Context",
    "Selector",
    "activations",
    "budgets",
    "choose",
    "choosing",
    "context_of",
    "curves",
    "knapsack",
    "ranks_for",
    "search",
    "selectors",
    "solvers",
    "spectral",
    "tails",
]
