"""Pools of values: listed in text files, composed of other pools, or those of words.py.

Every value belongs to one split, by a stable hash of its text, so that splits share no value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random

from . import words

# Pools of words.py beyond its lists. Those that make words up hold a word of their split in each
# value; a composed value with such a part needs no hash of its own.
MADE_UP = "name woman man town title brand password dish beverage vehicle".split()
MIXED = "meaning shade code number date when spot".split()
_PART = re.compile(r"\{(\w+)\}")


def built_in(name: str) -> bool:
    return name in words.LISTS or name in MADE_UP or name in MIXED


@dataclass
class Pool:
    """values: listed ones. compose: patterns such as "{number} euros"."""

    name: str
    where: str
    values: list[str] = field(default_factory=list)
    compose: list[str] = field(default_factory=list)

    def parts(self) -> set[str]:
        return {name for pattern in self.compose for name in _PART.findall(pattern)}


class Pools:
    """All pools by name."""

    def __init__(self, pools: dict[str, Pool]):
        self.pools = pools
        self._split: dict[tuple[str, str], tuple[str, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.pools or built_in(name)

    def makes_up(self, name: str) -> bool:
        """Whether each value of the pool holds a made-up word of its split."""
        pool = self.pools.get(name)
        if pool is None:
            return name in MADE_UP
        return not pool.values and all(
            any(self.makes_up(part) for part in _PART.findall(pattern)) for pattern in pool.compose
        )

    def listed(self, name: str, split: str) -> tuple[str, ...]:
        key = name, split
        if key not in self._split:
            values = dict.fromkeys(self.pools[name].values)
            self._split[key] = tuple(v for v in values if words.split_of(v) == split)
        return self._split[key]

    def usable(self, name: str, split: str) -> bool:
        """Whether the pool has values of this split."""
        pool = self.pools.get(name)
        return pool is None or bool(pool.compose) or bool(self.listed(name, split))

    def draw(self, rng: Random, name: str, split: str) -> str:
        """A value of `split`."""
        pool = self.pools.get(name)
        if pool is None:
            return words.value(rng, name, split)
        listed = self.listed(name, split)
        if not pool.compose or (listed and rng.random() < 0.5):
            return rng.choice(listed)
        made_up = self.makes_up(name)
        for _ in range(1000):
            pattern = rng.choice(pool.compose)
            own = made_up or any(self.makes_up(p) for p in _PART.findall(pattern))
            value = self._fill(rng, pattern, split if own else None)
            if own or words.split_of(value) == split:
                return value
        raise ValueError(f"pool {name} has too few values of the split {split}")

    def _fill(self, rng: Random, pattern: str, split: str | None) -> str:
        return _PART.sub(lambda m: self._part(rng, m[1], split), pattern)

    def _part(self, rng: Random, name: str, split: str | None) -> str:
        if split is None:
            split = rng.choices(words.SPLITS, (8, 1, 1))[0]
            if not self.usable(name, split):
                split = "train"
        return self.draw(rng, name, split)
