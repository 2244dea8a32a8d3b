"""Freed memory is kept for the next arrays, by the command line alone."""

from __future__ import annotations

import platform

import pytest

from tests.test_platform import fresh

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")

FAULTS = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = libc.memset.argtypes = None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = ctypes.c_void_p(libc.malloc(48 << 20))
        libc.memset(block, 1, ctypes.c_size_t(48 << 20))
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
KEPT = "from mlx_sleep.utils.malloc import keep_freed_memory\nkept = keep_freed_memory()\n"


def test_blocks_are_touched_by_the_system_once():
    code = FAULTS + KEPT + "print(json.dumps([kept, faults()]))"
    kept, few = fresh(code)
    by_user, many = fresh(code, MALLOC_MMAP_THRESHOLD_="131072")  # the environment's own stay
    assert kept and not by_user and many > 5 * few


def test_the_library_leaves_malloc_alone():
    code = (
        "import sys, mlx_sleep.session; print(json.dumps('mlx_sleep.utils.malloc' in sys.modules))"
    )
    assert fresh(code) is False
    code = "import sys, mlx_sleep.cli; print(json.dumps('mlx_sleep.utils.malloc' in sys.modules))"
    assert fresh(code) is True
