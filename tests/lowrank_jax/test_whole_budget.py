"""A budget of everything keeps everything, whatever data say."""

from collections.abc import Sequence
from typing import Any

import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax.ranks import Ranks


def smaller(candidates: Sequence[Ranks]) -> list[float]:
    """That less is better: of few examples it may be."""
    return [-float(sum(ranks.values())) for ranks in candidates]


@pytest.mark.parametrize(
    "selector, args",
    [
        ("knapsack", {"curve": "loss"}),
        ("lc", {"curve": "loss"}),
        ("greedy", {"steps": 4}),
        ("beam", {"steps": 4, "width": 2}),
        ("swaps", {}),
    ],
)
def test_active_ranks_stay_where_they_fit(selector: str, args: dict[str, Any]):
    """Though a rank that is lower scores higher; with less they are cut."""
    keys = nnx.Rngs(0)
    model = lr.factorize(
        nnx.Sequential(nnx.Linear(9, 6, rngs=keys), nnx.Linear(6, 4, rngs=keys))
    )
    found = [
        lr.ranks_for(
            model,
            score=smaller,
            **{selector: {"measure": "params", "fraction": fraction, **args}},
        )
        for fraction in (1.0, 0.7)
    ]
    assert found[0] == lr.max_ranks(model)
    assert sum(found[1].values()) < sum(found[0].values())
