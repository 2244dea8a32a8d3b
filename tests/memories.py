"""Memories for tests, and what is on the disk of them."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.memory import location as memory_location
from mlx_sleep.utils.errors import UserError

ROOT = Path(memory.__file__).parents[2]
SLEEP = {"passes": 2, "eviction": "hard", "window": 64}
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def bits(array: mx.array) -> tuple:
    return array.dtype, array.shape, np.array(array.view(BITS[array.dtype.size])).tobytes()


def some_arrays() -> dict[str, mx.array]:
    return {
        "layers.1.fast_weights": mx.random.normal((1, 2, 3, 4)),
        "layers.0.keys": mx.random.normal((1, 2, 5, 4)).astype(mx.bfloat16),
        "layers.0.valid": mx.random.bernoulli(0.5, (1, 5)),
    }


def ids(n: int) -> list[int]:
    return [random.randrange(1, 2**32) for _ in range(n)]


def make(home, name="ada", fingerprint="model-a") -> tuple[dict[str, mx.array], list[int]]:
    """A memory that slept once: two tokens were left over, three came since."""
    arrays, tokens = some_arrays(), ids(9)
    with Memory.open(name, fingerprint, model="some/model", home=home) as m:
        m.append(tokens[:5], "user", "My cat is Mia.")
        m.append(tokens[5:6], "assistant", "Nice.")
        m.commit(arrays, 4, **SLEEP)
        m.append(tokens[6:], "user", "Is she grey?")
    return arrays, tokens[4:]


def check(home, name, arrays, pending, fingerprint="model-a") -> memory.Header:
    with Memory.open(name, fingerprint, home=home) as m:
        assert {n: bits(a) for n, a in m.arrays.items()} == {n: bits(a) for n, a in arrays.items()}
        assert m.pending == pending
        return m.header


def files(home) -> dict[str, bytes]:
    """What lies there. -shm holds nothing, nor does an empty -wal. Not while this process has a
    memory open: its locks would go when the file is closed here."""
    found = {p.name: p.read_bytes() for p in sorted((Path(home) / "memories").iterdir())}
    return {n: b for n, b in found.items() if not n.endswith("-shm") and (b or n[-4:] != "-wal")}


def held(home, name="ada") -> tuple:
    """What the database holds, by another connection."""
    contents = memory_location.Location.of(name, home).load()
    arrays = {n: bits(a) for n, a in contents.arrays.items()}
    return contents.header, arrays, contents.pending, contents.messages, contents.settings


def refused(home, match, name="ada", fingerprint="model-a", **options) -> None:
    """Opening is refused with one line, and no file is touched."""
    before = files(home)
    with pytest.raises(UserError, match=match) as info:
        Memory.open(name, fingerprint, home=home, **options)
    assert "\n" not in str(info.value)
    assert files(home) == before


def spawn(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
