"""Questions about what was never told, or forgotten: mostly near misses of what was told."""

from __future__ import annotations

from .asker import Asker
from .drafts import Draft, Told
from .library import NAMES, Usable, ties
from .people import Entity
from .scenes import Scene
from .teller import Teller
from .world import key_of


class Untold:
    def __init__(self, told: Told, teller: Teller, asker: Asker):
        self.told, self.teller, self.asker = told, teller, asker
        self.rng, self.world, self.cast = told.rng, told.world, told.cast
        self.library = told.library

    def ask(self) -> Draft | None:
        """A question about something that was not told, mostly near to what was."""
        rng = self.rng
        for _ in range(20):
            found = self.near_miss(rng.random())
            if found is None:
                continue
            entity, usable, slot = found
            scene = usable.scene
            if not self.is_untold(entity, scene, slot):
                continue
            draft = self.asker.write(entity, usable, slot, None)
            if draft is not None:
                return draft
        return None

    def is_untold(self, entity: Entity, scene: Scene, slot: str) -> bool:
        """Nothing told answers it, nor nearly does."""
        key = key_of(entity, scene, slot)
        if key in self.world.facts or key in self.world.unclear:
            return False
        if not self.world.told(entity, scene) and self.cast.taken(ties(scene)):
            return False
        return not self.world.near(entity) & self.library.rivals[scene.id]

    def near_miss(self, r: float) -> tuple[Entity, Usable, str] | None:
        rng, told = self.rng, self.told
        facts = list(self.world.facts.values())
        if self.world.forgotten and r < 0.35:
            fact = rng.choice(list(self.world.forgotten.values()))
            return fact.entity, self.library.usable(fact.scene, told.split), fact.slot
        if facts and r < 0.8:
            fact = rng.choice(facts)
            scene, entity = fact.scene, fact.entity
            usable = self.library.usable(scene, told.split)
            untold = [s for s in scene.slots if key_of(entity, scene, s) not in self.world.facts]
            if untold and rng.random() < 0.5:
                return entity, usable, rng.choice(untold)
            if scene.about in ("person", "pet", "word") and rng.random() < 0.6:
                other = self.other(entity)
                return (other, usable, fact.slot) if other else None
            if entity.about in ("none",) or scene.id in NAMES:
                return None
            drawn = told.draw_scene(entity.about)
            if drawn is None or not self.teller.fits(entity, drawn.scene):
                return None
            return entity, drawn, rng.choice(list(drawn.scene.slots) or [""])
        drawn = told.draw_scene()
        assert drawn is not None  # every split has scenes
        scene = drawn.scene
        if scene.id in NAMES:
            beings = [e for e in self.cast.of(NAMES[scene.id]) if not e.linked]
            being = rng.choice(beings) if beings else None
            return (being, drawn, "v" if being.first == being.relation else "r") if being else None
        if scene.about == "me":
            subject: Entity | None = self.cast.me
        elif scene.about == "thing":
            subject = self.cast.thing(rng.choice(scene.subjects))
        elif scene.about == "none":
            subject = self.cast.none(scene.id)
        else:
            subject = self.other(None, scene.about)
        if subject is None:
            return None
        return subject, drawn, rng.choice(list(scene.slots) or [""])

    def other(self, entity: Entity | None, about: str = "") -> Entity | None:
        """Somebody else of the same sort, known or not."""
        about = entity.about if entity else about
        known = [e for e in self.cast.of(about) if e is not entity]
        if known and self.rng.random() < 0.6:
            return self.rng.choice(known)
        return self.cast.word() if about == "word" else self.cast.being(about)
