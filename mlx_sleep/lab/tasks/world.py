"""What has been told in a life, and what holds now. Turns carry the events that change it, so that
anybody can replay a life and check each answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .people import Entity
from .scenes import Scene

Key = tuple[str, str, str]  # entity, scene (or group of traits), slot ("" for a trait)


class Event(NamedTuple):
    """value: what is told of `key`; None where it is forgotten, or no longer known to hold."""

    key: Key
    value: str | None
    forgotten: bool = False


@dataclass(frozen=True)
class Asked:
    """A question put and the true answer. form: ask, yes, no, q, recall. value: of the fact; "" if
    never told. answer: the true reply, even where the turn's reply is wrong. age: windows since it
    was told. hops: 2 when told of a name and asked of a relation, or the other way round."""

    form: str
    key: Key
    told: bool
    value: str
    answer: str
    age: int = 0
    hops: int = 1
    pronoun: bool = False
    corrected: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Turn:
    """What the user types and the assistant replies. kind: tell, fix, forget, ask or chat. spans:
    (start, end) in the reply of what the answer hangs on. weight: of the loss on the reply."""

    user: str
    reply: str
    kind: str
    weight: float
    spans: tuple[tuple[int, int], ...] = ()
    events: tuple[Event, ...] = ()
    asked: Asked | None = None


@dataclass
class Fact:
    """A told slot (or trait, with slot "" and the scene's id as value)."""

    entity: Entity
    scene: Scene
    slot: str
    value: str
    window: int
    handle: str = ""
    old: list[str] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return key_of(self.entity, self.scene, self.slot)


def key_of(entity: Entity, scene: Scene, slot: str) -> Key:
    if not scene.slots:
        return entity.id, scene.group or scene.id, ""
    return entity.id, scene.id, slot


class World:
    def __init__(self):
        self.facts: dict[Key, Fact] = {}
        self.unclear: set[Key] = set()  # neither told nor untold: never asked
        self.forgotten: dict[Key, Fact] = {}
        self.scenes: dict[str, set[str]] = {}  # entity -> ids of scenes told of it

    def tell(self, fact: Fact) -> None:
        old = self.facts.get(fact.key)
        if old:
            fact.old = [*old.old, old.value] if old.value != fact.value else old.old
            if not fact.scene.slots and old.scene.id != fact.scene.id:
                self.scenes[fact.entity.id].discard(old.scene.id)
        self.facts[fact.key] = fact
        self.unclear.discard(fact.key)
        self.forgotten.pop(fact.key, None)
        self.scenes.setdefault(fact.entity.id, set()).add(fact.scene.id)

    def forget(self, entity: Entity, scene: Scene) -> None:
        for key in [k for k, f in self.facts.items() if f.entity is entity and f.scene is scene]:
            self.forgotten[key] = self.facts.pop(key)
        self.unclear -= {key_of(entity, scene, slot) for slot in scene.slots}
        self.scenes.get(entity.id, set()).discard(scene.id)

    def doubt(self, key: Key) -> None:
        if self.facts.pop(key, None):
            self.unclear.add(key)

    def value(self, entity: Entity, scene: Scene, slot: str) -> str | None:
        fact = self.facts.get(key_of(entity, scene, slot))
        return fact.value if fact else None

    def values(self, entity: Entity, scene: Scene) -> dict[str, str]:
        """The told slots of a scene."""
        found = {slot: self.value(entity, scene, slot) for slot in scene.slots}
        return {slot: value for slot, value in found.items() if value is not None}

    def near(self, entity: Entity) -> set[str]:
        """Scenes told of `entity`; the user, their things and their plans count as one."""
        if entity.about not in ("me", "thing", "none"):
            return self.scenes.get(entity.id, set())
        own = ("me", "thing:", "none:")
        return set().union(*(s for e, s in self.scenes.items() if e.startswith(own)))

    def told(self, entity: Entity, scene: Scene) -> bool:
        return scene.id in self.scenes.get(entity.id, ())
