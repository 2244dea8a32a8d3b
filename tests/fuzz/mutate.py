"""Ways to damage a file: its bytes, or one value of its JSON."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    3,
    2**31,
    2**63,
    10**30,
    -(2**31),
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "128",
    "\ud800",
    "\x1b[2J\x07",
    "a" * 5000,
    [],
    [None],
    [0, 1, 2],
    ["x"],
    {},
    {"a": 1},
    {"__float__": "Infinity"},
    [[[[]]]],
)


def damage_bytes(raw: bytes, draw: Random, first: int = 0, last: int | None = None) -> bytes:
    """One to three changes of raw[first:last]: bits, bytes, numbers, pieces gone or doubled."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        end = min(len(data), len(data) if last is None else last)
        if end <= first:
            break
        at = draw.randrange(first, end)
        size = draw.choice((1, 2, 4, 8, 64))
        match draw.randrange(8):
            case 0 | 1:
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                data[at] = draw.randrange(256)
            case 3:
                value = draw.choice((0, 1, 2**7, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                data[at : at + 8] = value.to_bytes(8, draw.choice(("little", "big")))[: len(data)]
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = data[at : at + size]
            case 6:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 7:
                del data[at:]
    return bytes(data)


def damage_json(text: str | bytes, draw: Random) -> tuple[str, tuple]:
    """(JSON with one value, or two, changed or gone; the path of the last one)."""
    value = json.loads(text)
    path: tuple = ()
    for _ in range(draw.choice((1, 1, 1, 2))):
        paths = list(_paths(value))
        if not paths:
            break
        # The top of a file is small and matters; the words of a vocabulary are many.
        shallow = [path for path in paths if len(path) < 3]
        path = draw.choice(draw.choice((shallow or paths, paths)))
        *parents, last = path
        owner = value
        for step in parents:
            owner = owner[step]
        match draw.randrange(10):
            case 0:
                del owner[last]
            case 1:
                other = draw.choice(paths)
                found = value
                try:
                    for step in other:
                        found = found[step]
                except (KeyError, IndexError, TypeError):
                    found = None
                owner[last] = json.loads(json.dumps(found))
            case 2 if isinstance(owner, dict):
                owner[str(draw.choice(HOSTILE))[:50]] = owner.pop(last)
            case _:
                owner[last] = copy.deepcopy(draw.choice(HOSTILE))
    return json.dumps(value), path


def _paths(value: Any, before: tuple = ()):
    if isinstance(value, dict | list):
        for step in value if isinstance(value, dict) else range(len(value)):
            yield (*before, step)
            yield from _paths(value[step], (*before, step))


def damage_text(raw: bytes, draw: Random) -> bytes:
    """A JSON file, damaged as JSON mostly, as bytes sometimes."""
    if draw.random() < 0.15:
        return damage_bytes(raw, draw)
    return damage_json(raw, draw)[0].encode("utf-8", "surrogatepass")
