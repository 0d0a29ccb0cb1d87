"""Arrays that span processes: two of them do what one does, number by number."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import relative_error
from several_processes import SCRIPT, numbers


def run(processes: int, folder: Path) -> list[dict[str, np.ndarray]]:
    """What each process finds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"{number}.npz" for number in range(processes)]
    tests = SCRIPT.parent
    search = os.pathsep.join([str(tests.parent), str(tests)])
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(processes), str(number), str(port), file],
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, file in enumerate(files)
    ]
    try:
        logs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(logs)
    return [dict(np.load(file)) for file in files]


@pytest.mark.slow  # 45 s on one core: every eager operation compiles for the mesh
def test_two_processes_do_what_one_does(tmp_path: Path):
    """Factorize, shrink, canonicalize, truncate, merge, and all that is read of a
    model; both processes find the same, bit for bit."""
    first, second = run(2, tmp_path)
    expected = numbers()
    assert first.keys() == second.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(first[name], second[name], name)
        assert relative_error(first[name], array) <= 1e-5, name
    assert len(expected) > 50
