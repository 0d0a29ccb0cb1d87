"""Budgets, stable ranks and the moment to factorize, against loops in NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factorization import factorize, kernel_matrices
from lowrank_jax.ranks import at_fraction
from lowrank_jax.selection import budgets, curves, solvers, spectral
from lowrank_jax.selection.tails import list_errors

RANDOM = np.random.default_rng(0)
SIZES = {"a": (12, 20, 1, 1), "b": (8, 8, 2, 9), "c": (3, 50, 1, 4)}
"""Rows, columns, matrices, and how often each factor is multiplied by."""
COSTS = {p: LayerCost(i, o, k, n, n, n) for p, (i, o, k, n) in SIZES.items()}
LIMITS = {"a": 12, "b": [8, 5], "c": 3}
SPECTRA = {
    "a": np.sort(RANDOM.exponential(size=12))[::-1],
    "b": np.sort(RANDOM.exponential(size=(2, 8)), axis=-1)[:, ::-1],
    "c": np.array([5.0, 1.0, 0.5]),
}
FULL = {"a": 12, "b": [8, 8], "c": 3}
MEASURES = ["params", "macs"]


def total(ranks, measure: str) -> int:
    """By hand: the smaller form of each matrix."""
    result = 0
    for path, rank in ranks.items():
        i, o, matrices, positions = SIZES[path]
        for one in np.broadcast_to(rank, matrices):
            smaller = min(i * o, int(one) * (i + o))
            result += smaller * (positions if measure == "macs" else 1)
    return result


def dense(measure: str) -> int:
    return total(dict.fromkeys(SIZES, 10**6), measure)


def least_prefix(spectrum: np.ndarray, removed: float) -> int:
    """The fewest columns, 1 at least, past which at most this share of s^2 goes."""
    squares = spectrum**2
    for rank in range(1, len(squares)):
        if squares[rank:].sum() <= removed * squares.sum() * (1 + 1e-12):
            return rank
    return len(squares)


def ranks_at(removed: float) -> dict[str, object]:
    return {
        path: least_prefix(one, removed)
        if one.ndim == 1
        else [least_prefix(row, removed) for row in one]
        for path, one in SPECTRA.items()
    }


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("share", [0.3, 0.4, 0.6, 0.85, 0.99, 1.0])
def test_energy_within_a_budget_is_the_best_threshold(share, measure):
    """Of all shares of energy to remove, from nothing up, the first that fits."""
    rows = [row for one in SPECTRA.values() for row in np.atleast_2d(one)]
    thresholds = sorted(
        {(row[n:] ** 2).sum() / (row**2).sum() for row in rows for n in range(len(row))}
        | {0.0}
    )
    profiles = [ranks_at(removed) for removed in thresholds]
    fits = [one for one in profiles if total(one, measure) <= share * dense(measure)]
    found = solvers.by_level(
        COSTS, FULL, list_errors(SPECTRA, FULL), share, measure=measure
    )
    assert found == fits[0]
    assert total(found, measure) <= share * dense(measure)
    if share < 0.9:  # the control: the next larger profile does not fit
        larger = profiles[profiles.index(fits[0]) - 1]
        assert total(larger, measure) > share * dense(measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_energy_within_a_budget_is_the_energy_rule(measure):
    """With the share that it found; a larger budget never means a lower rank."""
    found = [
        solvers.by_level(
            COSTS, FULL, list_errors(SPECTRA, FULL), share, measure=measure
        )
        for share in np.linspace(0.3, 1, 40)
    ]
    for small, large in itertools.pairwise(found):
        assert all(np.all(np.less_equal(small[p], large[p])) for p in SIZES)
    assert found[-1] == {"a": 12, "b": [8, 8], "c": 3} != found[0]
    energies = np.linspace(0.001, 1, 4000)
    by_share = [spectral.by_energy(SPECTRA, energy) for energy in energies]
    assert all(ranks in by_share for ranks in found)


def test_equal_tails_are_cut_together():
    """Equal spectra in any scale get equal ranks, though one more would fit in one."""
    costs = {path: LayerCost(10, 10, 1, 1, 1, 1) for path in "abc"}
    spectrum = np.array([8.0, 4.0, 2.0, 1.0])
    spectra = {"a": spectrum, "b": 4 * spectrum, "c": spectrum / 2}
    for count in range(3, 13):
        found = solvers.by_level(
            costs,
            dict.fromkeys("abc", 4),
            list_errors(spectra, dict.fromkeys("abc", 4)),
            count * 20 / 300,
            measure="params",
        )
        assert found == dict.fromkeys("abc", count // 3)


def test_energy_within_a_budget_knows_layers_of_nothing():
    """A layer cut to rank 0 stays there, one of zeros keeps a column, and all of them
    where they fit."""
    costs = {path: LayerCost(10, 10, 1, 1, 1, 1) for path in "abc"}
    spectra = {"a": np.zeros(0), "b": np.zeros(4), "c": SPECTRA["a"][:4]}
    full = {"a": 0, "b": 4, "c": 4}
    found = solvers.by_level(
        costs, full, list_errors(spectra, full), 0.5, measure="params"
    )
    assert found == {"a": 0, "b": 1, "c": 4}
    assert (
        solvers.by_level(costs, full, list_errors(spectra, full), 1.0, measure="params")
        == full
    )
    assert solvers.by_level({}, {}, {}, 0.5, measure="params") == {}


def test_a_masked_layer_of_rank_zero_stays_there():
    """And one of a low rank counts with it: what is masked has no importance."""
    costs = {path: LayerCost(10, 10, 1, 1, 1, 1) for path in "abc"}
    spectra = {"a": np.zeros(4), "b": np.array([2.0, 1.0, 0.0, 0.0]), "c": np.ones(4)}
    masked = {"a": 0, "b": 2, "c": 4}
    found = solvers.by_level(
        costs, masked, list_errors(spectra, masked), 1.0, measure="params"
    )
    assert found == masked
    least = 2 * 20 / 300  # a stays at nothing, so rank 1 is asked of two layers only
    found = solvers.by_level(
        costs, masked, list_errors(spectra, masked), least, measure="params"
    )
    assert found == {"a": 0, "b": 1, "c": 1}


def test_small_columns_are_kept_where_they_fit():
    """A tail of 1e-10 beside a head of 1 is there: 2.0e-20 of its energy."""
    costs = {"a": LayerCost(10, 10, 1, 1, 1, 1)}
    spectra = {"a": np.array([1.0, 1e-10, 1e-10, 0.0])}
    found = solvers.by_level(
        costs, {"a": 4}, list_errors(spectra, {"a": 4}), 0.7, measure="params"
    )
    assert found == {"a": 3} == spectral.by_energy(spectra, 1.0)


def test_macs_need_a_count_that_ran_the_layers():
    """Counts without an example know the parameters alone."""
    never = {"a": LayerCost(10, 10, 1, 0, 0, 0)}
    assert solvers.by_params_fraction(never, {"a": 10}, 0.4) == {"a": 2}
    with pytest.raises(UserError, match="macs_fraction: needs an example input"):
        solvers.by_macs_fraction(never, {"a": 10}, 0.4)


class Table(LayerCost):
    """Costs nothing from rank 7 on, as a table whose merged form is smaller."""

    def macs(self, rank):
        return sum(0 if one >= 7 else 10 * one for one in np.ravel(rank).tolist())


@pytest.mark.parametrize("share", np.linspace(0.3, 1, 15))
def test_costs_that_fall_with_the_rank_are_searched_whole(share):
    """Brute force over fractions and thresholds; bisection misses the full ranks."""
    costs = {"a": LayerCost(10, 10, 1, 1, 1, 1), "b": Table(20, 10, 1, 0, 0, 10)}
    limits, budget = {"a": 4, "b": 9}, share * 100
    found = solvers.by_macs_fraction(costs, limits, share)
    profiles = [at_fraction(limits, n / 36) for n in range(36, 0, -1)]
    totals = [budgets.total_cost(costs, one, "macs") for one in profiles]
    assert found == next(
        p for p, n in zip(profiles, totals, strict=True) if n <= budget
    )
    assert totals != sorted(totals, reverse=True)  # the control

    spectra = {"a": np.array([4.0, 3, 2, 1]), "b": np.linspace(9, 1, 9)}
    removed = {p: 1 - np.cumsum(s**2) / np.sum(s**2) for p, s in spectra.items()}
    profiles = [
        {path: 1 + int((r > level + 1e-12).sum()) for path, r in removed.items()}
        for level in sorted(np.append(np.concatenate([*removed.values()]), 0.0))
    ]
    totals = [budgets.total_cost(costs, one, "macs") for one in profiles]
    found = solvers.by_level(
        costs, limits, list_errors(spectra, limits), share, measure="macs"
    )
    assert found == next(
        p for p, n in zip(profiles, totals, strict=True) if n <= budget
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.62, 0.8, 0.999, 1.0])
def test_macs_fraction_is_within_the_budget_and_maximal(share):
    """Brute force over all common fractions."""
    found = solvers.by_macs_fraction(COSTS, LIMITS, share)
    budget = share * dense("macs")
    assert total(found, "macs") <= budget
    profiles = [at_fraction(LIMITS, n / 480) for n in range(1, 481)]
    fits = [profile for profile in profiles if total(profile, "macs") <= budget]
    assert found == max(fits, key=lambda p: (p["a"], *p["b"], p["c"]))


def test_macs_are_another_budget_than_parameters():
    """The control: at some shares one of the two budgets breaks the other."""
    over = set()
    for share in np.linspace(0.3, 0.99, 50):
        by_params = solvers.by_params_fraction(COSTS, LIMITS, share)
        by_macs = solvers.by_macs_fraction(COSTS, LIMITS, share)
        over.add(("macs", total(by_params, "macs") > share * dense("macs")))
        over.add(("params", total(by_macs, "params") > share * dense("params")))
    assert {("macs", True), ("params", True)} & over


def test_budgets_name_their_measure():
    """Below rank 1 everywhere with the least that is possible; out of range; unknown
    measures."""
    for measure in MEASURES:
        least = total(dict.fromkeys(SIZES, 1), measure) / dense(measure)
        with pytest.raises(ValueError, match=f"{measure}_fraction: .*{least:.4g} here"):
            solvers.by_level(
                COSTS, FULL, list_errors(SPECTRA, FULL), 0.1, measure=measure
            )
        ones = solvers.by_level(
            COSTS, FULL, list_errors(SPECTRA, FULL), least, measure=measure
        )
        assert ones == {"a": 1, "b": [1, 1], "c": 1}
    with pytest.raises(ValueError, match="macs_fraction: must be at least"):
        solvers.by_macs_fraction(COSTS, LIMITS, 0.01)
    for share in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"macs_fraction: must be in \(0, 1\]"):
            solvers.by_macs_fraction(COSTS, LIMITS, share)
    with pytest.raises(ValueError, match="'params', 'macs' or 'latency', got 'bytes'"):
        solvers.by_level(COSTS, FULL, list_errors(SPECTRA, FULL), 0.5, measure="bytes")


def test_stable_ranks_have_the_golden_value():
    """methods.md 0.2: 1.875 for 4, 3, 2, 1, whatever the basis and the scale."""
    basis = np.linalg.qr(RANDOM.normal(size=(6, 4)))[0]
    right = np.linalg.qr(RANDOM.normal(size=(4, 4)))[0]
    matrix = (basis * [4.0, 3.0, 2.0, 1.0]) @ right
    matrices = {
        "one": jnp.float32(matrix),
        "wide": jnp.float32(1e-4 * matrix.T),
        "stack": jnp.float32(np.stack([3 * matrix, 0 * matrix, np.eye(6, 4)])),
        "half": jnp.bfloat16(np.diag([4.0, 3.0, 2.0, 1.0])),
        "empty": jnp.zeros((3, 0)),
    }
    found = curves.stable_ranks(matrices)
    assert found.keys() == matrices.keys()
    for path in ("one", "wide", "half"):
        assert found[path].shape == () and found[path] == pytest.approx(1.875)
    np.testing.assert_allclose(found["stack"], [1.875, 0, 4], rtol=1e-5)
    assert found["empty"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_scaled_stable_ranks_are_full_at_the_start(seed):
    """xi sr is R then; in floats it may be more, and its ceiling R + 1."""
    random = np.random.default_rng(seed)
    shapes = [tuple(random.integers(2, 40, 2)) for _ in range(20)]
    matrices = {str(n): random.normal(size=x) for n, x in enumerate(shapes)}
    matrices["stack"] = random.normal(size=(3, 7, 25))
    full = {path: min(one.shape[-2:]) for path, one in matrices.items()}
    floats = {path: jnp.float32(one) for path, one in matrices.items()}
    initial = curves.stable_ranks(floats)
    found = spectral.scaled_stable_ranks(initial, initial, full)
    expected = {path: np.full(initial[path].shape, full[path]) for path in full}
    assert found == {path: one.tolist() for path, one in expected.items()}


def test_scaled_stable_ranks_do_not_round_up_what_is_whole():
    """Where floats give R + 1, or one more than the half, the answer does not."""
    values = RANDOM.uniform(1, 50, size=2000)
    more = 0
    for kind in (np.float64, np.float32):
        for value, full in zip(values, itertools.cycle([25, 999, 2050]), strict=False):
            first = kind(value)
            more += np.ceil(np.float64(full / first) * np.float64(first)) > full
            found = spectral.scaled_stable_ranks(
                {
                    "all": first,
                    "half": first / 2,
                    "noise": np.float64(first) / 2 * (1 + 1e-11),
                    "double": first * 2,
                },
                dict.fromkeys(("all", "half", "noise", "double"), first),
                dict.fromkeys(("all", "half", "noise", "double"), full),
            )
            half = -(-full // 2)
            assert found == {"all": full, "half": half, "noise": half, "double": full}
    assert more > 50  # the control: it does happen


def test_scaled_stable_ranks_follow_the_formula():
    """ceil(R sr / sr_0), 1 at least; what started at zero keeps its full rank."""
    now = {"a": np.array(2.1), "b": np.array([3.0, 0.0, 9.0]), "c": np.array(5.0)}
    first = {"a": np.array(6.0), "b": np.array([4.0, 4.0, 4.0]), "c": np.array(0.0)}
    found = spectral.scaled_stable_ranks(now, first, {"a": 10, "b": 8, "c": 7})
    assert found == {"a": 4, "b": [6, 1, 8], "c": 7}
    assert type(found["a"]) is int


def test_stable_ranks_of_a_model_become_rules():
    """From the kernels as they are factored: a conv counts by its own matrix."""
    model = nnx.Sequential(
        nnx.Conv(2, 5, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1))
    )
    matrices = kernel_matrices(model)
    initial = curves.stable_ranks(matrices)
    spectrum = np.linalg.svd(
        np.float64(model.layers[0].kernel[...]).reshape(18, 5), compute_uv=False
    )
    expected = (spectrum**2).sum() / spectrum[0] ** 2
    assert initial["layers/0"] == pytest.approx(expected, rel=1e-5)
    factors = curves.stable_ranks(kernel_matrices(factorize(model)))
    assert factors["layers/0"] == pytest.approx(expected, rel=1e-4)


def change_of(history: np.ndarray, window: int, points: int) -> float:
    """The largest mean slope of the layers, layer by layer and point by point."""
    largest = 0.0
    for series in history.T:
        average, averages = series[0], []
        for value in series:
            average = average + 2 / (window + 1) * (value - average)
            averages.append(average)
        last = averages[-points:]
        slopes = [last[1] - last[0], last[-1] - last[-2]]
        slopes += [(last[n + 1] - last[n - 1]) / 2 for n in range(1, points - 1)]
        largest = max(largest, sum(map(abs, slopes)) / points)
    return largest


def test_a_constant_history_stands_still_and_a_ramp_does_not():
    """Nor a short one, nor one with a single moving layer."""
    constant, ramp = np.full((40, 3), 7.0), np.arange(40.0)[:, None] * np.ones(3)
    assert spectral.stands_still(constant)
    assert spectral.stands_still(constant[:11])
    assert not spectral.stands_still(constant[:10])
    assert not spectral.stands_still(ramp)
    one = constant.copy()
    one[:, 1] = ramp[:, 1]
    assert not spectral.stands_still(one)
    assert spectral.stands_still(one[:, [0, 2]])
    assert not spectral.stands_still(np.where(one == 20, np.nan, one))
    slow = 0.09 * ramp
    assert spectral.stands_still(slow) and not spectral.stands_still(slow * 1.2)
    assert spectral.stands_still(slow * 1.2, tolerance=0.2)


@pytest.mark.parametrize(("window", "points"), [(15, 11), (3, 11), (15, 5)])
def test_standing_still_is_that_of_a_loop(window, points):
    """The answer turns at the loop's own number; the defaults are Cuttlefish's."""
    noise = 0.05 * RANDOM.normal(size=(60, 3))
    history = 10 * np.exp(-np.arange(60)[:, None] / [3.0, 8.0, 12.0]) + noise
    options = {} if (window, points) == (15, 11) else dict(window=window, points=points)
    for length in range(points, 61, 7):
        change = change_of(history[:length], window, points)
        for factor, expected in ((1 + 1e-9, True), (1 - 1e-9, False)):
            found = spectral.stands_still(
                history[:length], tolerance=factor * change, **options
            )
            assert found == expected
    assert not spectral.stands_still(history[:20]) and spectral.stands_still(history)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_energy_of_what_is_not_finite(bad):
    """Not rank 0, as for a layer of zeros; every layer that has it is named."""
    spectra = {"a": np.array([1.0, bad]), "b": np.ones(2), "": np.array([bad, 1.0])}
    message = "a, the model itself: importances must be finite"
    for energy in (0.9, 1.0):
        with pytest.raises(UserError, match=message):
            spectral.by_energy(spectra, energy)
    costs, full = {path: LayerCost(9, 9, 1, 1, 1, 1) for path in spectra}, {}
    with pytest.raises(UserError, match=message):
        solvers.by_level(costs, full, list_errors(spectra, full), 0.9, measure="params")
    assert spectral.by_energy({"a": np.zeros(2)}, 0.9) == {"a": 0}
