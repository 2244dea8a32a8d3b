"""What those who write one life share: its people, its truth so far, its writer's habits; and the
drafts that they hand in.

A draft is one or more turns with the changes of the world that they make; these happen only when
the draft finds room in a window. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .library import Library, Usable
from .noise import Style, typed
from .people import Cast, Entity
from .scenes import Scene
from .templates import plain
from .world import Fact, Turn, World


@dataclass(eq=False)
class Draft:
    """turns that stay together. changes: run when they are placed. topic: the only being that the
    last turn spoke of, and how. told: what it tells for the first time; empty if it tells more."""

    turns: list[Turn]
    changes: list[Callable[[], None]] = field(default_factory=list)
    topic: tuple[Entity, str] | None = None
    told: tuple[tuple[Entity, Scene], ...] = ()
    whole: bool = False  # no window boundary may fall inside


@dataclass(eq=False)
class Clause:
    """A sentence, marked, that tells facts. handle: how its subject was called."""

    text: str
    facts: list[Fact]
    entity: Entity
    handle: str


class Told:
    """What is shared by those who write one life. split: of its wordings. values: of its names and
    values, the same if not given."""

    def __init__(self, library: Library, split: str, level, rng: Random, values: str = ""):
        self.library, self.split, self.level, self.rng = library, split, level, rng
        self.values = values or split
        self.world = World()
        self.used: set[str] = set()
        self.cast = Cast(rng, self.values, self.used)
        self.style = Style.draw(rng, level.noise)
        self.window = 0
        self.topic: tuple[Entity, str] | None = None
        self.last: tuple[tuple[Entity, Scene], ...] = ()  # what the turn before told
        self.asked_here: set[str] = set()  # questions of this window

    def draw_scene(self, kind: str | None = None) -> Usable | None:
        """A scene of one kind, or of any; None where the split has none of the kind."""
        return self.library.draw(self.rng, self.split, kind, self.values)

    def draw_value(self, pool: str) -> str:
        """A value that this life has not used, unless its pool is used up."""
        for _ in range(30):
            value = self.library.pools.draw(self.rng, pool, self.values)
            if value.casefold() not in self.used:
                break
        self.used.add(value.casefold())
        return value

    def type(self, text: str) -> tuple[str, bool]:
        """The marked text as the user types it; True when values were lower-cased too."""
        lower = self.rng.random() < self.style.lower_values
        return plain(typed(self.rng, self.style, text, lower)), lower
