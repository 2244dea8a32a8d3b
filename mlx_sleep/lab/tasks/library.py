"""All scenes and pools, indexed for the writing of lives: which wordings a split may use, which
scenes would contradict or answer one another."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from random import Random

from .pools import Pools
from .scenes import Question, Scene, Wording
from .templates import Field

# Share of facts by what they are about; "name" is the scenes that give a being its name.
ABOUT_WEIGHTS = {
    "me": 0.36,
    "person": 0.22,
    "pet": 0.06,
    "thing": 0.1,
    "word": 0.07,
    "none": 0.12,
    "name": 0.09,
}
# Scenes (by group or id) about the user's relations: whoever has said that they are single does not
# speak of a wife, and whoever speaks of one has said that they are not.
TIES = {
    "me.relationship": {"wife", "husband", "partner"},
    "me.pets": {"pet"},
    "house.feed": {"pet"},
    "me.kids": {"son", "daughter"},
    "me.siblings": {"brother", "sister", "little brother", "older sister"},
    "me.household": {"flatmate", "roommate"},
    "me.boss": {"boss"},
    "house.landlord": {"landlord"},
    "me.doctor": {"doctor"},
    "house.neighbour_key": {"neighbour"},
    "me.neighbour": {"neighbour"},
}
NAMES = {"person.name": "person", "pet.name": "pet"}
_STOP = frozenset(
    """a an the my your our i you we he she it they me him her us his its their is are am was were
    be been do does did have has had can could would should will what which whom whose to of in on
    at for with by from as and or that this these those there s t re ve m d ll tell remember know
    again now name called say said one any much many some get got""".split()
)


_WH = frozenset("where when who how why".split())


def content(text: str) -> frozenset[str]:
    """The words of a question that carry its meaning, roughly; none if there are only "where"s."""
    found = frozenset(
        w[:-1] if w.endswith("s") and len(w) > 3 else w
        for w in re.findall(r"[a-z]+", text.lower())
        if w not in _STOP
    )
    return found if found - _WH else frozenset()


def readings(scene: Scene, wording: Wording) -> set[frozenset[str]]:
    """content() of a question, for each thing that it may be about; a question with nothing but
    the thing's name in it has none."""
    found = set()
    for thing in scene.subjects or ("",):
        parts = (p if isinstance(p, str) else thing if p.name == "s" else "" for p in wording.parts)
        words = content(" ".join(parts))
        if words - content(thing) - _WH:
            found.add(words)
    return found


@dataclass(frozen=True)
class Usable:
    """A scene with what one split may say of it."""

    scene: Scene
    tells: tuple[Wording, ...]
    fixes: dict[str, tuple[Wording, ...]]
    questions: dict[str, tuple[Question, ...]]  # by slot; "" for the whole scene

    @property
    def asks(self) -> bool:
        return any(self.questions.values())


class Library:
    def __init__(self, scenes: dict[str, Scene], pools: Pools):
        self.scenes, self.pools = scenes, pools
        self._splits: dict[tuple[str, str], dict[str, list[Usable]]] = {}
        self._sums: dict[tuple[str, str, str], list[float]] = {}
        self._usable: dict[tuple[str, str], Usable] = {}

    def kind(self, scene: Scene) -> str:
        return "name" if scene.id in NAMES else scene.about

    @cached_property
    def rivals(self) -> dict[str, frozenset[str]]:
        """Scenes that ask the same, or are of the same group: one of them for each subject."""
        by_words: dict[tuple, set[str]] = defaultdict(set)
        for scene in self.scenes.values():
            side = "user" if scene.about in ("me", "thing", "none") else scene.about
            for question in scene.questions:
                if scene.id not in NAMES:
                    for words in readings(scene, question.wording):
                        by_words[side, words].add(scene.id)
            if scene.group:
                by_words[scene.about, "group", scene.group].add(scene.id)
        found: dict[str, set[str]] = {name: set() for name in self.scenes}
        for names in by_words.values():
            for name in names:
                found[name] |= names - {name}
        return {name: frozenset(rivals) for name, rivals in found.items()}

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[Scene]]:
        groups = defaultdict(list)
        for scene in self.scenes.values():
            if scene.group:
                groups[scene.about, scene.group].append(scene)
        return groups

    def usable(self, scene: Scene, split: str) -> Usable:
        key = scene.id, split
        if key not in self._usable:
            tells, questions = scene.own(split)
            by_slot: dict[str, list[Question]] = defaultdict(list)
            for question in questions:
                by_slot[question.slot].append(question)
            self._usable[key] = Usable(
                scene,
                tuple(tells),
                {s: tuple(w for w in f if w.split == split) for s, f in scene.fixes.items()},
                {slot: tuple(q) for slot, q in by_slot.items()},
            )
        return self._usable[key]

    def of(self, split: str, values: str = "") -> dict[str, list[Usable]]:
        """Scenes that `split` can tell and ask, by kind. values: the split of the values, if it is
        another."""
        values = values or split
        key = split, values
        if key not in self._splits:
            kinds = defaultdict(list)
            for scene in self.scenes.values():
                usable = self.usable(scene, split)
                drawn = all(self.pools.usable(p, values) for p in scene.slots.values())
                if usable.tells and usable.asks and drawn:
                    kinds[self.kind(scene)].append(usable)
            for kind, found in kinds.items():
                self._sums[split, values, kind] = list(accumulate(u.scene.weight for u in found))
            self._splits[key] = dict(kinds)
        return self._splits[key]

    def draw(
        self, rng: Random, split: str, kind: str | None = None, values: str = ""
    ) -> Usable | None:
        """A scene, by weight; of one kind (None: the split has none), or of any."""
        kinds = self.of(split, values)
        if kind is None:
            names = [k for k in ABOUT_WEIGHTS if k in kinds]
            kind = rng.choices(names, [ABOUT_WEIGHTS[k] for k in names])[0]
        if kind not in kinds:
            return None
        return rng.choices(kinds[kind], cum_weights=self._sums[split, values or split, kind])[0]


def ties(scene: Scene) -> set[str]:
    return TIES.get(scene.group or scene.id, set())


def slots_mentioned(question: Question) -> set[str]:
    """Slots whose value is in the question or is needed for its answer."""
    parts = [*question.wording.parts, *(question.answer or ())]
    return {p.name for p in parts if isinstance(p, Field)}
