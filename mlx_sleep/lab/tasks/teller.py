"""What a user tells: facts, corrections, requests to forget, and the assistant's short replies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import speech, templates
from .drafts import Clause, Draft, Told
from .library import NAMES, Usable, ties
from .people import Entity, spoken_by_assistant
from .scenes import Scene, Wording
from .sentences import as_user, join, lower_first, stop
from .templates import Field, Who, plain, sentence_case
from .world import Event, Fact, Turn, key_of

ACK_WEIGHT = 0.1


class Teller:
    def __init__(self, told: Told):
        self.told = told
        self.rng, self.world, self.cast = told.rng, told.world, told.cast
        self.library = told.library

    # --- which fact ---

    def entity(self, usable: Usable) -> Entity | None:
        """Whom the scene is told of."""
        rng, scene = self.rng, usable.scene
        if scene.id in NAMES:
            about = NAMES[scene.id]
            known = [e for e in self.cast.of(about) if not e.linked]
            being = rng.choice(known) if known and rng.random() < 0.6 else self.cast.being(about)
            return being if being and self.cast.link(being) else None
        if scene.about == "me":
            return self.cast.me
        if scene.about == "none":
            return self.cast.none(scene.id)
        if scene.about == "thing":
            return self.cast.thing(rng.choice(scene.subjects))
        known = self.cast.of(scene.about)
        if scene.about == "word":
            known = [e for e in known if self.fits(e, scene)]
            return rng.choice(known) if known and rng.random() < 0.35 else self.cast.word()
        if known and rng.random() < (0.65 if len(known) < 6 else 0.85):
            return rng.choice(known)
        return self.cast.being(scene.about)

    def free(self, entity: Entity, usable: Usable) -> list[Wording]:
        """Wordings that tell something new of `entity` and contradict nothing."""
        scene = usable.scene
        told = self.world.scenes.get(entity.id, set())
        if self.world.near(entity) & self.library.rivals[scene.id]:
            return []
        if not scene.slots and scene.id in told:
            return []
        if scene.id not in told and self.cast.taken(ties(scene)):
            return []
        if any(key_of(entity, scene, s) in self.world.unclear for s in scene.slots):
            return []
        have = set(self.world.values(entity, scene))
        return [w for w in usable.tells if w.slots - have or not scene.slots]

    def pick(
        self, entity: Entity | None = None, kind: str | None = None
    ) -> tuple[Entity, Usable, Wording] | None:
        """Something new to tell; of `entity`, or of one kind, if given."""
        rng = self.rng
        kind = entity.about if entity else kind
        for _ in range(25):
            usable = self.told.draw_scene(kind)
            if usable is None:
                return None
            subject = entity or self.entity(usable)
            if subject is None:
                continue
            if entity and not self.fits(entity, usable.scene):
                continue
            wordings = self.free(subject, usable)
            if wordings:
                return subject, usable, rng.choice(wordings)
        return None

    def half(self) -> tuple[Entity, Usable, Wording] | None:
        """Half of what a question of two hops takes: a being's name and relation, or something else
        of it."""
        rng = self.rng
        beings = [e for about in ("person", "pet") for e in self.cast.of(about)]
        told = [e for e in beings if self.world.scenes.get(e.id)]
        waiting = [e for e in told if not e.linked]
        named = [e for e in told if e.linked and len(self.world.scenes[e.id]) < 3]
        if named and rng.random() < 0.6:
            return self.pick(rng.choice(named))
        if not waiting:
            return self.pick(kind=rng.choice(("person", "person", "name")))
        being = rng.choice(waiting)
        usable = self.library.usable(self.library.scenes[f"{being.about}.name"], self.told.split)
        if not usable.tells or not self.cast.link(being):
            return None
        return being, usable, rng.choice(usable.tells)

    def fits(self, entity: Entity, scene: Scene) -> bool:
        """Whether the scene can be about this thing, or about this word besides what it means."""
        if entity.about == "thing":
            return any(self.cast.thing_id(s) == entity.id for s in scene.subjects)
        if entity.about == "word":  # a word has one meaning; the old kinds add to one another
            told = self.world.scenes.get(entity.id, set())
            return not told or all(n.startswith("old.word.") for n in (scene.id, *told))
        return True

    # --- wording ---

    def handle(self, entity: Entity) -> str:
        """How the user calls somebody when telling; the first time maybe by relation and name."""
        rng = self.rng
        if entity.about == "thing":
            return entity.relation
        if not entity.linked and entity.relation and rng.random() < 0.15:
            if f"{entity.about}.name" in self.library.scenes and self.cast.link(entity):
                return f"{entity.relation} {entity.name}"
        return rng.choice(entity.known_as())

    def values(self, entity: Entity, scene: Scene, slots: Iterable[str]) -> dict[str, str]:
        """Values for these slots: those that hold, or new ones."""
        if scene.id in NAMES:
            return {"v": entity.name, "r": entity.relation.split(" ", 1)[1]}
        have = self.world.values(entity, scene)
        return {s: have.get(s) or self.told.draw_value(scene.slots[s]) for s in sorted(slots)}

    def clause(
        self,
        entity: Entity,
        scene: Scene,
        wording: Wording,
        values: dict[str, str],
        pronoun: bool = False,
    ) -> Clause:
        handle, who = "", None
        if scene.id not in NAMES and entity.about in ("person", "pet", "thing"):
            handle = self.handle(entity)
            who = Who.pronoun(entity.gender) if pronoun else entity.who(handle)
        text = templates.fill(wording.parts, {**values, "w": entity.name}, who)
        now = self.told.window
        if scene.slots:
            facts = [Fact(entity, scene, s, values[s], now, handle) for s in sorted(wording.slots)]
        else:
            facts = [Fact(entity, scene, "", scene.id, now, handle)]
        if who and not pronoun and entity.name and entity.relation and entity.name in handle:
            if entity.relation in handle:  # "my sister Mirela" says who Mirela is
                names = self.library.scenes[f"{entity.about}.name"]
                both = self.values(entity, names, ())
                facts += [Fact(entity, names, s, v, now, handle) for s, v in both.items()]
        return Clause(text, facts, entity, handle)

    def message(self, clauses: Sequence[Clause], kind: str, opener: str = "") -> Turn:
        """One turn that tells all clauses."""
        rng = self.rng
        text = join(rng, [c.text for c in clauses])
        opened = speech.SELF_OPENED.match(plain(text))
        if not opener and not opened and rng.random() < 0.22:
            opener = rng.choice(speech.TELL_OPENERS)
            bound = opener.endswith(("that ", "out ", "but "))
            if bound and not speech.SUBJECTS.match(plain(text)):
                opener = ""
        if opener:
            text = opener + lower_first(text)
        if plain(text)[-1:] not in ".!?" and rng.random() < 0.07 and kind == "tell":
            text += rng.choice(speech.TELL_CLOSERS)
        text = stop(sentence_case(text), "!" if rng.random() < 0.05 else ".")
        user, lowered = self.told.type(text)
        facts = [f for c in clauses for f in c.facts]
        if lowered:
            for fact in facts:
                fact.value = fact.value.lower() if fact.slot else fact.value
        events = tuple(Event(f.key, f.value) for f in facts)
        return Turn(user, self.acknowledgement(facts, kind), kind, ACK_WEIGHT, (), events)

    def acknowledgement(self, facts: Sequence[Fact], kind: str) -> str:
        rng = self.rng
        fact = facts[0]
        if kind == "fix":
            acks = speech.FIX_ACKS
        else:
            acks = speech.ACKS
        if not fact.slot or rng.random() >= 0.25:
            return rng.choice(acks)
        values = {f.slot: f.value for f in facts if f.scene is fact.scene}
        values = {**self.world.values(fact.entity, fact.scene), **values, "w": fact.entity.name}
        parts = fact.scene.says[fact.slot][0]
        fields = {p.name for p in parts if isinstance(p, Field)}
        if not fields & set(fact.scene.slots) <= set(values):
            return rng.choice(acks)
        handle = spoken_by_assistant(fact.handle)
        text = templates.fill(parts, values, fact.entity.who(handle) if handle else None)
        text = plain(text).rstrip(".!")
        if text.split(" ")[0] in ("You", "Your", "The", "It", "There", "A", "An"):
            text = text[:1].lower() + text[1:]
        elif not text.startswith(fact.entity.name or "\0"):
            return rng.choice(acks)
        reply = rng.choice(speech.ECHO_ACKS).format(x=text)
        return reply

    # --- drafts ---

    def place(self, draft: Draft, clauses: Sequence[Clause]) -> Draft:
        """Adds what happens to the world when the draft is placed."""

        def happen():
            for clause in clauses:
                for fact in clause.facts:
                    fact.window = self.told.window
                    self.world.tell(fact)
                    self.cast.relations |= ties(fact.scene)
                    if fact.scene.id in NAMES:
                        fact.entity.linked = True

        draft.changes.append(happen)
        told = dict.fromkeys((f.entity, f.scene.id) for c in clauses for f in c.facts)
        scenes = [(entity, self.library.scenes[name]) for entity, name in told]
        if not any(scene.id in NAMES or self.world.told(e, scene) for e, scene in scenes):
            draft.told = tuple(scenes)
        beings = {c.entity for c in clauses}
        being = beings.pop() if len(beings) == 1 else None
        if being is not None and being.has_pronoun():
            draft.topic = being, clauses[-1].handle or self.rng.choice(being.known_as())
        return draft

    def tell(self) -> Draft | None:
        """A message with 1 to 4 facts; now and then the rest of what the turn before told."""
        rng, told = self.rng, self.told
        topic = told.topic
        count = rng.choices((1, 2, 3, 4), told.level.facts_per_message)[0]
        clauses: list[Clause] = []
        taken: set[tuple[str, str]] = set()
        for i in range(count):
            entity = None
            if i == 0 and topic and rng.random() < 0.4:
                entity = topic[0]
            elif clauses and rng.random() < 0.55:
                entity = clauses[-1].entity
            if entity is not None and entity.about == "none":
                entity = None
            found = None
            if told.level.two_hop and rng.random() < told.level.two_hop:
                found = self.half()
            elif i == 0 and len(told.last) == 1 and rng.random() < 0.25:
                found = self.rest(*told.last[0])
            found = found or self.pick(entity)
            if found is None:
                continue
            entity, usable, wording = found
            scene = usable.scene
            owner = "user" if entity.about in ("thing", "none") else entity.id
            near = {(owner, name) for name in (scene.id, *self.library.rivals[scene.id])}
            if near & taken:
                continue
            taken |= near
            before = clauses[-1].entity if clauses else topic[0] if topic else None
            pronoun = entity is before and rng.random() < (0.75 if clauses else 0.5)
            if not entity.has_pronoun() or not wording.mentions("s"):
                pronoun = False
            clauses.append(self.told_clause(entity, usable, wording, pronoun))
        return self.say(clauses) if clauses else None

    def rest(self, entity: Entity, scene: Scene) -> tuple[Entity, Usable, Wording] | None:
        """A wording that tells what the turn before left out of a scene."""
        usable = self.library.usable(scene, self.told.split)
        have = set(self.world.values(entity, scene))
        wordings = [w for w in self.free(entity, usable) if not w.slots & have or len(have) > 1]
        return (entity, usable, self.rng.choice(wordings)) if wordings else None

    def told_clause(
        self, entity: Entity, usable: Usable, wording: Wording, pronoun: bool = False
    ) -> Clause:
        values = self.values(entity, usable.scene, wording.slots)
        return self.clause(entity, usable.scene, wording, values, pronoun)

    def say(self, clauses: Sequence[Clause]) -> Draft:
        """One message that tells these."""
        turn = self.message(clauses, "tell")
        if len(clauses) == 1 and self.rng.random() < self.told.level.quick_fix:
            turn = self.quick_fix(turn, clauses[0]) or turn
        return self.place(Draft([turn]), clauses)

    def quick_fix(self, turn: Turn, clause: Clause) -> Turn | None:
        """The same message with its value put right in the same breath."""
        if len(clause.facts) != 1 or not clause.facts[0].slot or clause.facts[0].scene.id in NAMES:
            return None
        fact = clause.facts[0]
        wrong, right = fact.value, self.told.draw_value(fact.scene.slots[fact.slot])
        right = right.lower() if wrong.islower() and wrong != wrong.title() else right
        fix = self.rng.choice(speech.FIX_SHORT).format(x=right)
        user = turn.user.rstrip(".!") + self.rng.choice((" - ", ", ", ". ", "... ")) + fix
        fact.value = right
        fact.old = [wrong]
        ack = self.acknowledgement([fact], "tell")
        return Turn(user, ack, "tell", ACK_WEIGHT, (), (Event(fact.key, right),))

    def fix(self, fact: Fact) -> Draft | None:
        """A message that replaces the value of a fact."""
        rng, scene, entity = self.rng, fact.scene, fact.entity
        if scene.id in NAMES:
            return None
        usable = self.library.usable(scene, self.told.split)
        if not fact.slot:
            return self.change_trait(fact)
        fixes = usable.fixes.get(fact.slot, ())
        tells = [w for w in usable.tells if fact.slot in w.slots]
        options = fixes if fixes and (not tells or rng.random() < 0.65) else tells
        if not options:
            return None
        wording = rng.choice(options)
        opener = ""
        opened = speech.SELF_OPENED.match(wording.text)
        if (wording in tells or rng.random() < 0.4) and not opened:
            opener = rng.choice(speech.FIX_OPENERS)
        elif wording in tells:
            return None  # without a sign it would read like a second fact
        values = self.world.values(entity, scene)
        main = fact.slot == scene.main
        for slot in sorted(wording.slots):  # a set has no order from process to process
            if slot == fact.slot or main or slot not in values:
                values[slot] = self.told.draw_value(scene.slots[slot])
        if any(
            isinstance(p, Field) and p.name in scene.slots and p.name not in values
            for p in wording.parts
        ):
            return None
        topic = self.told.topic
        pronoun = (
            topic is not None
            and topic[0] is entity
            and entity.has_pronoun()
            and wording.mentions("s")
        )
        clause = self.clause(entity, scene, wording, values, pronoun and rng.random() < 0.5)
        clause.facts = [f for f in clause.facts if f.scene is not scene or f.slot in wording.slots]
        turn = self.message([clause], "fix", opener)
        doubted = [key_of(entity, scene, s) for s in scene.slots if s not in wording.slots]
        doubted = [k for k in doubted if main and k in self.world.facts]
        events = (*turn.events, *(Event(k, None) for k in doubted))
        turn = Turn(turn.user, turn.reply, "fix", ACK_WEIGHT, (), events)
        draft = self.place(Draft([turn]), [clause])

        def doubt() -> None:
            for key in doubted:
                self.world.doubt(key)

        draft.changes.append(doubt)
        return draft

    def insist(self, fact: Fact) -> Draft | None:
        """Tells a fact again, after the assistant got it wrong."""
        usable = self.library.usable(fact.scene, self.told.split)
        values = self.world.values(fact.entity, fact.scene)
        options = [w for w in usable.tells if fact.slot in w.slots and w.slots <= set(values)]
        options = [w for w in options if not speech.SELF_OPENED.match(w.text)]
        if fact.scene.id in NAMES or not options:
            return None
        clause = self.clause(fact.entity, fact.scene, self.rng.choice(options), values)
        turn = self.message([clause], "fix", self.rng.choice(speech.INSIST_OPENERS))
        return self.place(Draft([turn]), [clause])

    def change_trait(self, fact: Fact) -> Draft | None:
        """A counter-trait of the same group."""
        rng = self.rng
        others = self.library.groups.get((fact.scene.about, fact.scene.group), [])
        usable = [self.library.usable(s, self.told.split) for s in others if s is not fact.scene]
        usable = [u for u in usable if u.tells and u.asks and not u.scene.slots]
        if not usable:
            return None
        new = rng.choice(usable)
        wording = rng.choice(new.tells)
        if speech.SELF_OPENED.match(wording.text):
            return None
        clause = self.clause(fact.entity, new.scene, wording, {})
        opener = rng.choice(speech.FIX_OPENERS)
        return self.place(Draft([self.message([clause], "fix", opener)]), [clause])

    def forget(self, fact: Fact) -> Draft | None:
        """A request to forget all of a fact's scene."""
        rng, scene, entity = self.rng, fact.scene, fact.entity
        what = scene.whats.get(scene.main) or scene.whats.get("")
        if scene.id in NAMES or what is None:
            return None
        who = None
        if entity.about in ("person", "pet", "thing"):
            who = entity.who(rng.choice(entity.known_as()))
        clause = templates.fill(as_user(what), {"w": entity.name}, who)
        text = rng.choice(speech.FORGET).format(x=clause)
        return self.forgetting(text, ((entity, scene),))

    def forget_that(self) -> Draft:
        """A request to forget what the turn before told."""
        return self.forgetting(self.rng.choice(speech.FORGET_THAT), self.told.last)

    def forgetting(self, text: str, told: Sequence[tuple[Entity, Scene]]) -> Draft:
        user, _ = self.told.type(sentence_case(text))
        facts = self.world.facts.values()
        keys = [f.key for f in facts if any(f.entity is e and f.scene is s for e, s in told)]
        events = tuple(Event(key, None, True) for key in sorted(keys))
        reply = self.rng.choice(speech.FORGET_ACKS)
        turn = Turn(user, reply, "forget", ACK_WEIGHT, (), events)

        def forget() -> None:
            for entity, scene in told:
                self.world.forget(entity, scene)

        return Draft([turn], [forget])
