"""Who or what facts are about: the user, people, pets, things, made-up words.

An entity may be known by a relation ("my sister"), by a name, or by both once the user has said
that they are one: then a fact told by one is asked by the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from . import words
from .templates import Who

MALE = frozenset("brother father dad uncle son husband grandfather nephew grandpa".split())
FEMALE = frozenset("sister mother mum mom aunt daughter wife grandmother niece grandma".split())
_KIN = """sister brother mother father mum mom dad aunt uncle cousin son daughter wife husband
partner grandmother grandfather grandma grandpa nephew niece"""
_OTHERS = """boss neighbour teacher colleague roommate doctor dentist landlord friend coach
hairdresser flatmate trainer"""
PEOPLE = (*_KIN.split(), *_OTHERS.split(), "best friend", "little brother", "older sister")
PETS = tuple("dog cat rabbit parrot horse hamster goldfish turtle pony puppy kitten".split())
# Words for one and the same being, or too near to tell apart: one of each in a life.
NEAR = (
    {"mother", "mum", "mom"},
    {"father", "dad"},
    {"grandmother", "grandma"},
    {"grandfather", "grandpa"},
    {"friend", "best friend"},
    {"partner", "wife", "husband"},
    {"brother", "little brother"},
    {"sister", "older sister"},
    {"roommate", "flatmate"},
    {"coach", "trainer", "teacher"},
    {"dog", "puppy"},
    {"cat", "kitten"},
    {"horse", "pony"},
)


@dataclass(eq=False)
class Entity:
    """about: as in a scene. relation: "my sister", "our cat", "the boat". linked: the user has said
    that relation and name are the same being. first: how it was known before."""

    id: str
    about: str
    gender: str = "it"
    relation: str = ""
    name: str = ""
    linked: bool = False
    first: str = ""

    def __post_init__(self):
        self.first = self.first or self.relation or self.name

    def has_pronoun(self) -> bool:
        """Whether "he", "she" or "it" can stand for this; not for "my keys"."""
        if self.about == "thing":
            return re.search(r"([^su]s|ses|ies)$", self.relation) is None
        return self.about in ("person", "pet")

    def known_as(self) -> list[str]:
        """The handles that the user can use and be understood."""
        if self.linked:
            return [self.relation, self.name]
        return [self.first]

    def who(self, handle: str) -> Who:
        keep = self.name if self.name in handle else ""
        if keep and keep != handle:  # "my sister Mirela" tells the relation too
            keep = handle.split(" ", 1)[1]
        return Who.called(handle, self.gender, keep)


def spoken_by_assistant(handle: str) -> str:
    for mine in ("my ", "our "):
        if handle.startswith(mine):
            return "your " + handle[len(mine) :]
    return handle


class Cast:
    """The entities of one life."""

    def __init__(self, rng: Random, split: str, used: set[str]):
        self.rng, self.split, self.used = rng, split, used
        self.all: list[Entity] = []
        self.me = Entity("me", "me")
        self.nones: dict[str, Entity] = {}
        self.relations: set[str] = set()  # taken, or not to be spoken of

    def of(self, about: str) -> list[Entity]:
        return [e for e in self.all if e.about == about]

    def fresh(self, draw) -> str:
        for _ in range(50):
            value = draw()
            if value.casefold() not in self.used:
                break
        self.used.add(value.casefold())
        return value

    def relation(self, about: str) -> str:
        """A relation that no one has yet; "" if there is none left."""
        free = [r for r in (PEOPLE if about == "person" else PETS) if r not in self.relations]
        if not free:
            return ""
        relation = self.rng.choice(free)
        self.relations |= {relation}.union(*(near for near in NEAR if relation in near))
        return relation

    def name(self, gender: str) -> str:
        kind = {"he": "man", "she": "woman"}[gender]
        return self.fresh(lambda: words.value(self.rng, kind, self.split))

    def taken(self, relations: set[str]) -> bool:
        """Whether there is a being with one of these relations; "pet": any pet."""
        return bool(relations & self.relations) or ("pet" in relations and bool(self.of("pet")))

    def being(self, about: str) -> Entity | None:
        """A new person or pet, known by relation (mostly) or by name; None where the user has said
        that there are no pets."""
        rng = self.rng
        if about == "pet" and "pet" in self.relations:
            return None
        relation = self.relation(about) if rng.random() < 0.75 else ""
        gender = rng.choice(("he", "she"))
        gender = "he" if relation.split(" ")[-1] in MALE else gender
        gender = "she" if relation.split(" ")[-1] in FEMALE else gender
        own = "our " if about == "pet" and rng.random() < 0.35 else "my "
        name = "" if relation else self.name(gender)
        handle = own + relation if relation else ""
        entity = Entity(f"{about}{len(self.all)}", about, gender, handle, name)
        self.all.append(entity)
        return entity

    def link(self, entity: Entity) -> bool:
        """Gives a being the name or the relation that it lacks; False if none is left."""
        if not entity.name:
            entity.name = self.name(entity.gender)
        if not entity.relation:
            fits = FEMALE if entity.gender == "he" else MALE
            relation = self.relation(entity.about)
            if not relation or relation.split(" ")[-1] in fits:
                return False
            entity.relation = "my " + relation
        return True

    def thing(self, handle: str) -> Entity:
        """The thing called `handle`; "my boat" and "the boat" are one."""
        name = self.thing_id(handle)
        for entity in self.of("thing"):
            if entity.id == name:
                return entity
        entity = Entity(name, "thing", "it", handle)
        self.all.append(entity)
        return entity

    @staticmethod
    def thing_id(handle: str) -> str:
        return "thing:" + re.sub("^(my|our|the) ", "", handle)

    def word(self) -> Entity:
        word = self.fresh(lambda: words.made_up(self.rng, self.split))
        entity = Entity("word:" + word, "word", "it", "", word)
        self.all.append(entity)
        return entity

    def none(self, scene_id: str) -> Entity:
        """What a scene about nobody is about: itself."""
        return self.nones.setdefault(scene_id, Entity("none:" + scene_id, "none"))
