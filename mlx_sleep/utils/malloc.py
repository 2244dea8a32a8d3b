"""glibc's malloc, told to keep what a model frees: MLX's CPU backend has no cache of its own.

Each array of a step is freed and asked for again in the next. By default glibc gives large blocks
back to the system at once, and the system fills every page of them with zeros the next time: a
fifth of the time of a prompt, a tenth of a training step.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)
_LARGE, _LARGE_BEFORE, _PAD = 1 << 30, 32 << 20, 64 << 20  # bytes


def keep_freed_memory() -> bool:
    """Keeps freed memory, up to a gigabyte at the heap's end, for the next arrays of this process.

    For programs of ours alone: a library leaves its host's malloc as it is. False where there is
    nothing to tell: another malloc than glibc's, or one that the environment has set up.
    """
    by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or by_user:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    large = mallopt(_MMAP_THRESHOLD, _LARGE) or mallopt(_MMAP_THRESHOLD, _LARGE_BEFORE)
    return bool(large and mallopt(_TRIM_THRESHOLD, _LARGE) and mallopt(_TOP_PAD, _PAD))
