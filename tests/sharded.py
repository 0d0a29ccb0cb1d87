"""A short run that does all there is to do (tests/faults/config.py), and its comparison
across devices and processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from faults import config as faults

TOLERANCE = 1e-4
"""Of losses and parameters, relative; 1e-7 a step, for SVDs between the phases more."""


def short_run(**changes: Any) -> dict[str, Any]:
    return faults.get_config("smoke").to_dict() | changes


def assert_same_run(actual: Path, expected: Path) -> None:
    """Every loss and figure; ranks and arrays of every step that both have kept."""
    lines, wanted = support.metric_lines(actual), support.metric_lines(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for key in other.keys() - {"train/examples_per_s"}:
            assert line[key] == pytest.approx(other[key], rel=TOLERANCE, abs=1e-6), key
    kept = [
        {path.name for path in (run / "checkpoints").iterdir()}
        for run in (actual, expected)
    ]  # one that was stopped has saved other steps, too
    assert max(map(int, kept[0])) == max(map(int, kept[1]))
    for step in kept[0] & kept[1]:
        saved, other = (support.at_step(run, int(step)) for run in (actual, expected))
        assert saved.metadata["ranks"] == other.metadata["ranks"]
        arrays, others = support.stored_arrays(saved), support.stored_arrays(other)
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            scale = max(np.abs(others[key]).max(initial=0), 1e-3)
            np.testing.assert_allclose(
                array, others[key], rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=key
            )
