"""Memory that is freed stays, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator"
)

PROGRAM = """
import resource
import sys
import numpy as np
from train import allocator

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

kept = allocator.keep_freed() if "keep" in sys.argv else None
block = np.ones(2**24)
before = resident()
del block
print(kept, before - resident() < 2**26)
"""


def outcome(*arguments: str, **environment: str) -> str:
    """What `keep_freed` returned, and whether 128 MiB that were freed stay."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_memory_that_is_freed_is_kept():
    assert outcome("keep") == "True True"


def test_without_it_memory_goes_back_to_the_system():
    assert outcome() == "None False"


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=134217728"},
    ],
)
def test_the_environment_has_the_last_word(environment: dict[str, str]):
    assert outcome("keep", **environment).split()[0] == "False"
