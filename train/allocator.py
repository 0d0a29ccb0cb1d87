"""What the C library does with memory that XLA's programs on a CPU give back."""

import ctypes
import os

# mallopt's parameters, as glibc's malloc.h numbers them
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_CHUNK = 64 * 2**20
"""How many bytes the heap grows by at least."""


def keep_freed() -> bool:
    """Has glibc keep what is freed, so that the next step's buffers are mapped already.

    By default it gives every block beyond 32 MiB back to the system at once, and a step
    then waits for its pages anew: a third of the time of a small transformer's step.
    The price is that the process stays as large as it has once been.

    Returns:
      Whether it does: not where the C library is another, or where the environment
      (`MALLOC_*`, `GLIBC_TUNABLES`) says what it shall do.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _CHUNK))
    return all(mallopt(name, value) for name, value in settings)
