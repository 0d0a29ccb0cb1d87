"""Budgets of models with lookups, whose MACs do not rise with the rank."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lowrank_jax.active import get_ranks
from lowrank_jax.counting import count
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize
from lowrank_jax.selection.choosing import ranks_for


class Lookup(nnx.Module):
    """A table that is looked up, whose dense form costs no MACs, and a layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(40, 16, rngs=rngs)
        self.out = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.table(tokens))


@pytest.mark.parametrize(
    "choice",
    [
        {"macs_fraction": 1.0},
        {"energy_budget": {"measure": "macs", "fraction": 1.0}},
        {"beam": {"measure": "macs", "fraction": 1.0, "width": 2, "steps": 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("part", [Lookup, lambda rngs: nnx.Embed(40, 16, rngs=rngs)])
def test_the_whole_budget_of_a_lookup_cuts_nothing(part, choice):
    """Its table costs MACs at low ranks and none at the full one, merged."""
    model = factorize(part(nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    cost, full = count(model, tokens), get_ranks(model)
    assert cost.macs(full) < cost.macs(dict.fromkeys(full, 8))
    assert (
        ranks_for(
            model, tokens, score=lambda candidates: [0.0] * len(candidates), **choice
        )
        == full
    )


def test_lookups_alone_have_no_budget_of_macs_to_keep():
    """Below the rank where the merged table is smaller they cost more than dense."""
    model = factorize(nnx.Embed(40, 16, rngs=nnx.Rngs(0)), [(".*", {"max_rank": 4})])
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    with pytest.raises(UserError, match="^macs_fraction: .* got lookups alone"):
        ranks_for(model, tokens, macs_fraction=0.5)
