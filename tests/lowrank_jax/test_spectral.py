"""Rules that read a rank off a spectrum: golden values, bounds, ties, noise."""

import numpy as np
import pytest

from lowrank_jax import linalg
from lowrank_jax.errors import UserError
from lowrank_jax.selection import curves, spectral, tails

SPECTRUM = np.array([4.0, 3.0, 2.0, 1.0])
RANDOM = np.random.default_rng(0)
STACK = np.sort(RANDOM.exponential(size=(3, 8)), axis=-1)[:, ::-1]
STACKS = {"a": STACK, "b": STACK[0]}


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 2), (0.8, 3), (0.9, 4), (0.95, 4), (1.0, 4)]
)
def test_the_entropy_rule_has_the_golden_values(share, rank):
    """methods.md 0.2."""
    assert spectral.by_entropy({"a": SPECTRUM}, share) == {"a": rank}


def test_ranks_of_a_spectrum_have_the_golden_values():
    """methods.md 0.2: the stable rank, and exp of the entropy of s / sum s."""
    assert linalg.stable_rank(SPECTRUM) == pytest.approx(1.875, abs=1e-12)
    assert linalg.effective_rank(SPECTRUM) == pytest.approx(3.5961155, abs=1e-7)
    for rank in (linalg.stable_rank, linalg.effective_rank):
        assert rank(np.zeros(4)) == 0 and rank(np.zeros(0)) == 0
        assert rank(np.array([2.0, 0.0])) == pytest.approx(1)
        assert rank(np.full(7, 3.0)) == pytest.approx(7)
        assert rank(STACK).shape == (3,)
        assert np.isnan(rank(np.array([np.nan, 1.0])))


def test_the_min_max_spectrum_has_the_golden_values():
    """methods.md 0.2: (1, 2/3, 1/3, 0), of which the largest of each tail is left."""
    np.testing.assert_allclose(
        tails.min_max(SPECTRUM), [1, 2 / 3, 1 / 3, 0, 0], atol=1e-15
    )


@pytest.mark.parametrize("name", tails.TAILS)
def test_curves_fall_to_nothing(name):
    """In any order of columns, with ties, zeros, one value, none; in any scale."""
    curve = tails.TAILS[name]
    mixed = RANDOM.exponential(size=(2, 5, 6))
    for values in (STACK, mixed, np.ones(5), np.zeros(5), np.ones(1), np.zeros(0)):
        found = curve(values)
        assert found.shape == (*values.shape[:-1], values.shape[-1] + 1)
        assert np.isfinite(found).all() and (found[..., -1] == 0).all()
        assert (np.diff(found, axis=-1) <= 0).all()
        scaled = curve(2.0 * values) / (4 if name == "squares" else 1)
        np.testing.assert_allclose(scaled, found, rtol=1e-12)
        if name != "squares" and values.shape[-1] and values.any():
            np.testing.assert_allclose(found[..., 0], 1, rtol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_the_entropy_rule_is_the_least_prefix(share):
    """By a loop in NumPy; one column fewer would miss the share."""
    found = spectral.by_entropy(STACKS, share)
    for row, rank in zip(STACK, found["a"], strict=True):
        p = row / row.sum()
        parts = np.cumsum(-p * np.log(p))
        assert rank == 1 + np.argmax(parts >= share * parts[-1] * (1 - 1e-9))
    assert found["b"] == found["a"][0]


def test_the_entropy_rule_meets_shares_exactly():
    """Equal values share it equally; a single one has none, and stays."""
    for kept in range(1, 8):
        assert spectral.by_entropy({"a": np.ones(7)}, kept / 7) == {"a": kept}
    odd = {"a": np.array([3.0, 0.0]), "b": np.zeros(3), "c": np.ones(1)}
    for share in (0.1, 1.0):
        assert spectral.by_entropy(odd, share) == {"a": 1, "b": 0, "c": 1}


def test_the_threshold_keeps_what_is_at_it():
    """A share of the largest; a column behind a small one keeps that one too."""
    spectrum = {"a": SPECTRUM}
    for threshold, rank in ((0, 4), (0.25, 4), (0.26, 3), (0.5, 3), (0.75, 2), (1, 1)):
        assert spectral.by_threshold(spectrum, threshold) == {"a": rank}
    assert spectral.by_threshold({"a": np.array([1.0, 0.1, 2.0, 0.1])}, 0.5) == {"a": 3}
    nothing = {"a": np.zeros(3), "b": np.array([1.0, 0.0]), "c": np.zeros(0)}
    for threshold in (0, 0.5):
        found = spectral.by_threshold(nothing, threshold)
        assert found == {"a": 0, "b": 1, "c": 0}


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0, 100.0])
def test_a_scale_multiplies_a_measured_rank(scale):
    """Rounded up, one at least, never above the layer's own."""
    measured = {"a": np.array([1.875, 3.0, 0.0]), "b": np.array(2.0)}
    found = spectral.by_scale(measured, scale, {"a": [8, 2, 5], "b": 0})
    by_hand = [
        min(max(int(np.ceil(scale * x - 1e-6)), 1), full)
        for x, full in zip(measured["a"], (8, 2, 5), strict=True)
    ]
    assert found == {"a": by_hand, "b": 0}


def noisy(rows: int, columns: int, rank: int, strength: float, seed: int) -> np.ndarray:
    """Singular values of a planted matrix of a rank in unit noise."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.normal(size=(rows, rank)))[0]
    right = np.linalg.qr(random.normal(size=(columns, rank)))[0]
    planted = strength * left @ right.T
    return np.linalg.svd(
        planted + random.normal(size=(rows, columns)), compute_uv=False
    )


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
@pytest.mark.parametrize("seed", range(3))
def test_evbmf_finds_the_planted_rank(seed, scale):
    """methods.md 0.2: 64 x 576 in unit noise has its threshold at 34.62, and five
    values of 60 stand out; of noise alone nothing does, and a column stays."""
    sizes = {"a": (64, 576)}
    for rank, strength, expected in ((5, 60.0, 5), (3, 45.0, 3), (1, 1.0, 1)):
        spectrum = scale * noisy(64, 576, rank, strength, seed)
        assert spectral.by_noise({"a": spectrum}, sizes) == {"a": expected}
        assert spectral.by_noise({"a": spectrum}, {"a": (576, 64)}) == {"a": expected}


def test_evbmf_has_its_golden_threshold():
    """methods.md 0.2: of 64 x 576 in unit noise; it scales with the noise."""
    for rows, columns in ((64, 576), (576, 64)):
        threshold = spectral.noise_threshold(rows, columns, 1.0)
        assert threshold == pytest.approx(34.624883, abs=1e-6)
    assert spectral.noise_threshold(64, 576, 3.0) == pytest.approx(3 * threshold)


def test_evbmf_knows_spectra_of_nothing():
    """Zeros, none, one value, a low-rank product without noise."""
    spectra = {
        "a": np.zeros(4),
        "b": np.zeros(0),
        "c": np.ones(1),
        "d": np.array([[3.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
    }
    sizes = {"a": (4, 9), "b": (4, 9), "c": (1, 5), "d": (4, 4)}
    found = spectral.by_noise(spectra, sizes)
    assert found["a"] == 1 and found["b"] == 0 and found["c"] == 1
    assert len(found["d"]) == 2 and all(1 <= rank <= 4 for rank in found["d"])


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, float("nan")])
def test_shares_out_of_bounds_are_refused(bad):
    with pytest.raises(UserError, match=r"^entropy: must be in \(0, 1\], got"):
        spectral.by_entropy({"a": SPECTRUM}, bad)
    if bad != 0:
        with pytest.raises(UserError, match=r"^threshold: must be in \[0, 1\], got"):
            spectral.by_threshold({"a": SPECTRUM}, bad)
    if not bad > 0:
        with pytest.raises(UserError, match="^scale: must be positive, got"):
            spectral.by_scale({"a": np.array(2.0)}, bad, {"a": 4})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_the_layer(bad):
    broken = {"a": SPECTRUM, "b": np.array([1.0, bad])}
    for rule in (
        lambda: spectral.by_entropy(broken, 0.5),
        lambda: spectral.by_threshold(broken, 0.5),
        lambda: spectral.by_noise(broken, {"a": (4, 4), "b": (2, 2)}),
        lambda: spectral.by_scale(broken, 1.0, {"a": 4, "b": 2}),
    ):
        with pytest.raises(UserError, match="^b: importances must be finite"):
            rule()


def test_losses_are_those_of_one_matrix_cut_alone():
    """Against scores taken one by one; a stack matrix by matrix; a rank that loses less
    than a higher one counts as that one, gains count nothing, NaN is the worst."""
    ranks = {"a": 6, "b": [3, 2], "c": 0}
    table = {"a": [9.0, 4.0, 5.0, 2.0, -1.0, 0.5, 0.0], "b": [[5.0, 3.0, 1.0, 0.0]] * 2}
    calls = []

    def score(candidates):
        calls.append(candidates)
        return [
            10.0
            - table["a"][one["a"]]
            - sum(row[rank] for row, rank in zip(table["b"], one["b"], strict=True))
            for one in candidates
        ]

    whole = table["b"][1][2]  # what the active ranks lose already
    found = curves.losses(score, ranks, levels=100)
    assert len(calls) == 1 and found.keys() == ranks.keys()
    np.testing.assert_allclose(found["a"][0], [9, 5, 5, 2, 0.5, 0.5, 0])
    np.testing.assert_allclose(found["b"][0], [5, 3, 1, 0])
    np.testing.assert_allclose(found["b"][1], [5 - whole, 3 - whole, 0])
    np.testing.assert_allclose(found["c"][0], [0])
    (few,) = curves.losses(score, ranks, levels=2)["a"]
    np.testing.assert_allclose(few, [9, 9 - 7 / 3, 9 - 14 / 3, 2, 4 / 3, 2 / 3, 0])
    table["a"][0] = np.nan
    assert curves.losses(score, ranks)["a"][0][0] >= 5
