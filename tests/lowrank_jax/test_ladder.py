"""The ladder: how often each rung, of which layer, from when on, over a cut."""

import jax
import numpy as np
import pytest
from drawing import chi_square, draws

from lowrank_jax import samplers
from lowrank_jax.errors import UserError

FRACTIONS, CHANCES = (0.28, 1.0, 0.5), (0.5, 0.2, 0.3)
RANKS = {"a": 25, "b": [25, 10], "gone": 0}
RUNGS = {25: [7, 25, 13], 10: [3, 10, 5]}  # 0.28 * 25 is 7.000000000000001 in floats


def ladder(warmup_steps: int = 0) -> samplers.RankSampler:
    return samplers.ladder(
        fractions=FRACTIONS, chances=CHANCES, warmup_steps=warmup_steps
    )


def rungs_of(drawn: np.ndarray, rank: int) -> np.ndarray:
    """The index of each draw's rung; a rank that is no rung fails."""
    assert set(np.unique(drawn)) <= set(RUNGS[rank])
    return np.array([RUNGS[rank].index(number) for number in drawn])


def test_rungs_are_exact_and_come_with_their_chances_independently():
    """Chi-square of each matrix alone, and of each pair of matrices jointly."""
    drawn = draws(ladder(), RANKS, 4000)
    assert not drawn["gone"].any()
    matrices = [
        rungs_of(drawn["a"], 25),
        rungs_of(drawn["b"][:, 0], 25),
        rungs_of(drawn["b"][:, 1], 10),
    ]
    joint = np.outer(CHANCES, CHANCES).ravel()
    for first, second in zip(matrices, matrices[1:] + matrices[:1], strict=True):
        assert chi_square(np.bincount(first, minlength=3), np.array(CHANCES)) < 4
        assert chi_square(np.bincount(3 * first + second, minlength=9), joint) < 3


def test_only_the_full_rung_comes_in_the_warm_up():
    """For exactly so many steps; `step` counts, not the calls."""
    drawn = draws(ladder(warmup_steps=40), RANKS, 80)
    for path, rank in RANKS.items():
        np.testing.assert_array_equal(
            drawn[path][:40], np.broadcast_to(rank, drawn[path][:40].shape)
        )
    assert (drawn["a"][40:] < 25).any() and (drawn["b"][40:] < 25).any(axis=0).all()
    sampler = ladder(warmup_steps=40)
    keys = jax.random.split(jax.random.key(0), 50)
    for step, below in ((39, False), (40, True)):
        state = sampler.init(RANKS)
        late = jax.vmap(lambda key, s=step, x=state: sampler.sample(x, key, s)[0])(keys)
        assert (late["a"] < 25).any() == below


def test_a_cut_lowers_the_rungs_above_it_and_leaves_the_others():
    """A new state would have other rungs; the warm-up does not begin again."""
    sampler = ladder(warmup_steps=2)
    state = sampler.keep(sampler.init(RANKS), {"a": 10, "b": [25, 4], "gone": 0})
    assert state.tables["a"].tolist() == [7, 10, 10]
    assert state.tables["b"].T.tolist() == [[7, 25, 13], [3, 4, 4]]
    assert sampler.init({"a": 10}).tables["a"].tolist() == RUNGS[10]
    again = sampler.keep(state, {"a": 5, "b": [25, 2], "gone": 0})
    assert again.tables["a"].tolist() == [5, 5, 5]
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: sampler.sample(state, key, 2)[0])(keys)
    assert set(np.unique(drawn["a"])) == {7, 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": (0.5, 0.2, 0.1)}, r"fractions must hold 1"),
        ({"chances": (0.5, 0.5)}, r"chances as many numbers, got .*\(0.5, 0.5\)"),
        ({"chances": (0.5, 0.5, 0.5)}, r"add up to 1, got"),
        ({"chances": (1.5, -0.5, 0.0)}, r"at least 0"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1"),
    ],
)
def test_wrong_ladders_are_refused(arguments, message):
    """When they are made."""
    given = {"fractions": FRACTIONS, "chances": CHANCES, "warmup_steps": 0}
    with pytest.raises(UserError, match=message):
        samplers.ladder(**given | arguments)
