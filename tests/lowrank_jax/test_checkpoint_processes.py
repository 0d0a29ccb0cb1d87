"""Checkpoints of several processes: written together, read by any number of them."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(count: int, action: str, folder: Path) -> list[list[str]]:
    """The lines that each process of a run printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(ROOT / "tests" / "two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(count), str(index), action, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(count)
    ]
    try:
        done = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    return [out.splitlines() for out, _ in done]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """What one process and what two processes wrote: the same numbers."""
    folders = {n: tmp_path_factory.mktemp("run") / str(n) for n in (1, 2)}
    printed = {n: run(n, "save", folder) for n, folder in folders.items()}
    lines = printed[1][0]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert lines[0].split()[-1] != lines[1].split()[-1]
    assert printed[2] == [lines, lines]
    return folders


def written(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "2/params").iterdir() if p.stem[0] == "p")


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("writers", [1, 2])
def test_any_number_of_processes_reads_the_same_bits(folders, writers, readers):
    """Each writer wrote its own part, and what is not spread is written once."""
    folder = folders[writers]
    names = [f"process_{i}.{end}" for i in range(writers) for end in ("bin", "json")]
    assert written(folder) == names
    sizes = [
        (folder / f"2/params/process_{i}.bin").stat().st_size for i in range(writers)
    ]
    assert sum(sizes) == (24 * 16 + 16 * 16 + 16) * 4
    index = [
        json.loads((folder / f"2/local/process_{i}.json").read_text())["pieces"]
        for i in range(writers)
    ]
    assert [sorted(pieces) for pieces in index] == [["step"], []][:writers]
    expected = run(1, "read", folders[1])[0]
    assert expected[0].startswith("step 2: ")
    assert run(readers, "read", folder) == [expected] * readers


def test_damage_that_one_process_sees_is_an_error_on_all(folders):
    """Both go on with the step before, and neither waits for the other for ever."""
    file = folders[2] / "2/params/process_1.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    lines = run(2, "read", folders[2])
    assert [one[1].split(":")[0] for one in lines] == ["step 1", "step 1"]
    assert lines[0][1] == lines[1][1]
    texts = sorted(one[0] for one in lines)
    assert all(text.startswith("damaged: checkpoint ") for text in texts)
    assert "its checksum must be" in texts[0] + texts[1]
