"""What the contract of selectors runs: a row for each."""

from collections.abc import Mapping, Sequence
from typing import Any


class Row:
    """A selector's arguments, from the least to the most, which is everything; one
    without arguments has none of that."""

    def __init__(self, *args: Mapping[str, Any], bad: Sequence[tuple[Any, str]]):
        self.args, self.bad = args, bad


def values(*numbers: Any) -> list[dict[str, Any]]:
    return [{"value": number} for number in numbers]


def within(measure: str, *fractions: float, **more: Any) -> list[dict[str, Any]]:
    return [{"measure": measure, "fraction": f, **more} for f in fractions]


BUDGET_ERRORS = [
    ({"fraction": float("nan"), "measure": "macs"}, r"macs_fraction: must be in \(0"),
    ({"fraction": 1.5, "measure": "params"}, r"params_fraction: must be in \(0, 1\]"),
    ({"fraction": 1e-3, "measure": "params"}, "params_fraction: must be at least"),
    ({"fraction": 0.5, "measure": "bytes"}, "measure: must be 'params', 'macs'"),
    ({"fraction": 0.5, "measure": 3}, "measure: must be a string, got 3"),
    ({"fraction": 0.5}, "must be given the arguments .*missing.*'measure'"),
]
MULTIPLE_ERRORS = [
    *BUDGET_ERRORS,
    (
        {"fraction": 0.5, "measure": "params", "multiple_of": 0},
        "multiple_of: must be at least 1, got 0",
    ),
]
CURVE_ERRORS = [
    *MULTIPLE_ERRORS,
    (
        {"fraction": 0.9, "measure": "params", "curve": "spectrum"},
        "curve: must be one of .*'energy'.*, got 'spectrum'",
    ),
]
SCALES = Row(
    *values(0.01, 0.7, 1.5, 100.0),
    bad=[({"value": bad}, "scale: must be positive, got") for bad in (0, float("nan"))],
)
BEAM = {"width": 100_000, "steps": 100_000}  # all there are, one rank at a time

ROWS: dict[str, Row] = {
    "rank": Row(
        *values(0, 1, 2, 4, 6, 99),
        bad=[
            ({"value": -1}, "rank: must be at least 0, got -1"),
            ({"value": 2.5}, "^must be a whole number, got 2.5"),
            ({"value": float("nan")}, "^must be a whole number, got nan"),
            ({"value": "8"}, "^must be a whole number, got '8'"),
            ({"value": True}, "^must be a whole number, got True"),
            ({"valu": 8}, "^must be given the arguments .'value'., got .*valu"),
        ],
    ),
    "rank_fraction": Row(
        *values(0.01, 0.3, 0.5, 0.9, 1.0),
        bad=[
            ({"value": bad}, r"rank_fraction: must be in \(0, 1\], got")
            for bad in (0, 1.01, -0.5, float("nan"), float("inf"))
        ]
        + [({"value": None}, "^must be a number, got None")],
    ),
    "ranks": Row(
        *values({"head": 0}, {"head": 1}, {"head": 2}, {}),
        bad=[
            ({"value": {"head": 99}}, r"^head: rank must be in \[0, "),
            ({"value": {"blocks": [1, 2]}}, r"nested lists of shape \(3,\), got \[1"),
            ({"value": {"blocks": 7}}, "blocks: rank must be in .*got 7"),
            ({"value": {"head": float("nan")}}, "head: rank must be a whole number"),
            ({"value": {"had": 1}}, r"must name low-rank layers, got \['had'\]"),
            ({"value": [1, 2]}, "^must be a mapping of paths to ranks"),
        ],
    ),
    "energy": Row(
        *values(0.01, 0.3, 0.8, 0.99, 1.0),
        bad=[
            ({"value": bad}, r"energy: must be in \(0, 1\], got")
            for bad in (0, 1.01, float("nan"))
        ],
    ),
    "energy_fraction": Row(
        *values(0.01, 0.3, 0.5, 0.9, 1.0),
        bad=[
            ({"value": bad}, r"rank_fraction: must be in \(0, 1\], got")
            for bad in (0, 1.01, float("nan"))
        ],
    ),
    "params_fraction": Row(
        *values(0.4, 0.6, 0.9, 1.0),
        bad=[({"value": bad}, "params_fraction: must") for bad in (0, 2, float("nan"))],
    ),
    "macs_fraction": Row(
        *values(0.4, 0.6, 0.9, 1.0),
        bad=[({"value": bad}, "macs_fraction: must") for bad in (0, 2, float("nan"))],
    ),
    "entropy": Row(
        *values(0.01, 0.3, 0.8, 0.99, 1.0),
        bad=[
            ({"value": bad}, r"entropy: must be in \(0, 1\], got")
            for bad in (0, 1.01, float("nan"))
        ],
    ),
    "threshold": Row(
        *values(1.0, 0.8, 0.5, 0.0),
        bad=[
            ({"value": bad}, r"threshold: must be in \[0, 1\], got")
            for bad in (-0.1, 1.01, float("nan"))
        ],
    ),
    "stable_rank": SCALES,
    "effective_rank": SCALES,
    "evbmf": Row({}, bad=[({"value": 1.0}, r"must be given the arguments \[\], got")]),
    "energy_budget": Row(*within("params", 0.4, 0.6, 0.9, 1.0), bad=MULTIPLE_ERRORS),
    "minimax": Row(*within("macs", 0.4, 0.6, 0.9, 1.0), bad=MULTIPLE_ERRORS),
    "welore": Row(
        *within("params", 0.75, 0.85, 1.0, multiple_of=2), bad=MULTIPLE_ERRORS
    ),
    "lc": Row(*within("macs", 0.4, 0.6, 0.9, 1.0), bad=CURVE_ERRORS),
    "knapsack": Row(*within("params", 0.4, 0.6, 0.9, 1.0), bad=CURVE_ERRORS),
    "family": Row(*within("macs", 0.4, 0.6, 0.9, 1.0), bad=BUDGET_ERRORS),
    "greedy": Row(
        *within("macs", 0.6, 0.8, 1.0, steps=20),
        bad=[({"steps": 20, **args}, message) for args, message in BUDGET_ERRORS]
        + [
            (
                {"measure": "macs", "fraction": 0.5, "steps": 0},
                "^width and steps: must be at least 1",
            )
        ],
    ),
    "swaps": Row(
        *within("macs", 0.6, 0.8, 1.0),
        bad=[
            *BUDGET_ERRORS,
            (
                {"measure": "macs", "fraction": 0.6, "rounds": -1},
                "rounds, steps: must be at least 0 and 1, got -1 and 8",
            ),
        ],
    ),
    "beam": Row(
        *within("macs", 0.6, 0.8, 1.0, **BEAM),
        bad=[({**BEAM, **args}, message) for args, message in BUDGET_ERRORS]
        + [
            (
                {"measure": "macs", "fraction": 0.5, "width": 0, "steps": 1},
                "^width and steps: must be at least 1",
            ),
            (
                {"measure": "macs", "fraction": 0.5, "width": 1.5, "steps": 1},
                "^width: must be a whole number, got 1.5",
            ),
        ],
    ),
}
