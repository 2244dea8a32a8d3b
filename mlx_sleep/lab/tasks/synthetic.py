"""What the tasks of the study share: draws that depend on an index alone, batches, and windows.

An example is a pure function of (seed, split, index): the same in every process, in any order and
whatever else is in its batch. Nothing here knows a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...utils.errors import UserError

SPLITS = ("train", "valid", "test")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: splitmix64's step
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Batch(NamedTuple):
    """B examples as numpy arrays: W windows of L tokens to sleep over, then F tokens of answers.

    context   [B, W, L] int32
    mask      [B, W, L] bool, False for padding on the right; None when nothing is padded
    final     [B, F] int32: questions and answers
    final_mask  [B, F] bool, or None
    question  [B, F] int32: of which question this token is a label, from 0 on; -1 is of none
    """

    context: np.ndarray
    mask: np.ndarray | None
    final: np.ndarray
    final_mask: np.ndarray | None
    question: np.ndarray


def draws(name: object, indices: Sequence[int], count: int) -> np.ndarray:
    """Random numbers uint64 [B, count] for the examples `indices`; name (any repr) picks the set.

    splitmix64 (Steele, Lea, Flood 2014) once over the index and once over the position, so that a
    whole batch takes some array operations and no example knows of another.
    """
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):  # it is arithmetic modulo 2^64
        rows = _mix(key + _GOLDEN * np.asarray(indices, np.uint64))
        return _mix(rows[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    return z ^ (z >> np.uint64(31))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")


def check_int(what: str, value: object, least: int) -> int:
    """value, if it is an int of at least `least`. UserError says what is wrong."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} must be a whole number >= {least}, not {value!r}")
    return value


def window_count(context: int, window: int) -> int:
    """Windows of `window` tokens in a context; UserError unless they come out even."""
    check_int("the window", window, 2)
    if window > context:
        raise UserError(f"a window of {window} tokens is larger than the context of {context}")
    if context % window:
        raise UserError(f"windows of {window} tokens do not divide a context of {context}")
    return context // window
