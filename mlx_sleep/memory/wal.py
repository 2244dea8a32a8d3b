"""SQLite's write-ahead log, NAME.sqlite-wal, checked before SQLite reads it.

SQLite takes the first frame with a wrong checksum for the end of the log and goes on without what
follows. Right for a write that a power loss cut short, wrong for a damaged log: acknowledged turns
would be gone without a word. (File format: https://www.sqlite.org/fileformat2.html#walformat)
"""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoints, two salts, two checksums
_FRAME = struct.Struct(">6I")  # page, pages after a commit (else 0), two salts, two checksums
_MAGIC = 0x377F0682  # | 1 when the checksums are of big-endian words
_BLOCK = 4096  # what a disk loses at once


def wal_problem(log: bytes) -> str | None:
    """What is wrong with a log, in a few words; None for one that is whole, or that a crash left.

    A crash can only cut the last transaction short: each is synced before the next begins. What it
    leaves is a frame that ends with the file, or blocks of zeros where the bytes did not arrive.
    """
    if len(log) < _HEADER.size or not any(log):
        return None
    magic, _, page, _, *salts, one, two = _HEADER.unpack_from(log)
    words = ">u4" if magic & 1 else "<u4"
    checksum = _checksum(log[: _HEADER.size - 8], words, (0, 0))
    if magic | 1 != _MAGIC | 1 or checksum != (one, two):
        return "checksum mismatch in its log"
    size = _FRAME.size + page
    for at in range(_HEADER.size, len(log) - size + 1, size):
        _, _, *salt, one, two = _FRAME.unpack_from(log, at)
        body = log[at : at + 8] + log[at + _FRAME.size : at + size]
        checksum = _checksum(body, words, checksum)
        if salt == salts and checksum == (one, two):
            continue
        if all(old != new for old, new in zip(salt, salts, strict=True)) and any(salt):
            return None  # left from before the last checkpoint
        lost = any(
            not any(log[b : b + _BLOCK]) for b in range(-(-at // _BLOCK) * _BLOCK, len(log), _BLOCK)
        )
        commits = sum(
            frame[1] > 0 and frame[2:4] == tuple(salts)
            for frame in (_FRAME.unpack_from(log, i) for i in range(at, len(log) - size + 1, size))
        )
        return None if lost and commits <= 1 else f"checksum mismatch at byte {at} of its log"
    return None


def _checksum(data: bytes, words: str, start: tuple[int, int]) -> tuple[int, int]:
    """SQLite's: for each pair of words (a, b), s += a + t, then t += b + s, modulo 2**32."""
    pairs = np.frombuffer(data, words).astype(np.uint32).reshape(-1, 2)
    powers = _powers(len(pairs))
    step = np.stack([pairs[:, 0], pairs.sum(1, dtype=np.uint32)], 1)  # what a pair adds to (s, t)
    total = powers[0] @ np.array(start, np.uint32)
    total += np.einsum("nij,nj->i", powers[1:], step, dtype=np.uint32)
    return int(total[0]), int(total[1])


@cache
def _powers(n: int) -> np.ndarray:
    """[n + 1, 2, 2]: [[1, 1], [1, 2]] to the powers n, ..., 1, 0, modulo 2**32."""
    powers = [np.eye(2, dtype=np.uint32)]
    for _ in range(n):
        powers.append(np.array([[1, 1], [1, 2]], np.uint32) @ powers[-1])
    return np.stack(powers[::-1])
