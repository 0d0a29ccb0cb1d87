"""Rank selectors of a user's own."""

from lowrank_jax.ranks import Ranks, at_fraction
from lowrank_jax.selection.context import Context


def all_but(context: Context, *, path: str, fraction: float = 0.5) -> Ranks:
    """Keeps a fraction of every rank but one."""
    ranks = at_fraction(context.ranks, fraction)
    return {**ranks, path: context.ranks[path]}


def raised(context: Context) -> Ranks:
    """Asks for a rank more than there is."""
    return {path: rank + 1 for path, rank in context.ranks.items()}
