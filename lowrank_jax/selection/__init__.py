"""Rank selection: curves of what a rank costs and loses, solvers from them to ranks,
and the selectors that have a name."""

from lowrank_jax.selection import curves, search, selectors, solvers
from lowrank_jax.selection.selectors import (
    SELECTORS,
    Context,
    Selector,
    choose,
    context_of,
    ranks_for,
)

__all__ = [
    "SELECTORS",
    "Context",
    "Selector",
    "choose",
    "context_of",
    "curves",
    "ranks_for",
    "search",
    "selectors",
    "solvers",
]
