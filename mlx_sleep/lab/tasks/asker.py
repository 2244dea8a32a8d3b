"""What a user asks, and the true answer: about facts of any age, and about what was never told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import speech, templates
from .drafts import Draft, Told
from .library import NAMES, Usable, slots_mentioned, ties
from .people import Entity, spoken_by_assistant
from .scenes import Question, Scene
from .sentences import as_user, lower_first, marked_answer, stop
from .templates import Field, Who, plain, sentence_case
from .world import Asked, Fact, Turn, key_of

# Share of the forms of a question, where a fact allows them all.
FORMS = {"ask": 0.6, "recall": 0.1, "yes": 0.1, "no": 0.09, "q": 0.12}


class Asker:
    def __init__(self, told: Told):
        self.told = told
        self.rng, self.world, self.cast = told.rng, told.world, told.cast
        self.library = told.library

    # --- which fact ---

    def fact(self, ages: tuple[int, int] | None = None) -> Fact | None:
        """A told fact; all ages that there are come about equally often. ages: least and most."""
        by_age: dict[int, list[Fact]] = {}
        for fact in self.world.facts.values():
            age = self.told.window - fact.window
            if ages is None or ages[0] <= age <= ages[1]:
                by_age.setdefault(age, []).append(fact)
        if not by_age:
            return None
        found = sorted(by_age)
        weights = [1 + age / (1 + found[-1]) for age in found]  # the oldest are the hardest
        return self.rng.choice(by_age[self.rng.choices(found, weights)[0]])

    # --- questions ---

    def questions(self, usable: Usable, slot: str, values: Mapping[str, str]) -> dict[str, list]:
        """Questions on a slot by form, of those that need no untold slot."""
        by_form: dict[str, list[Question]] = {}
        for question in (*usable.questions.get(slot, ()), *(usable.questions.get("", ()))):
            needed = slots_mentioned(question) & set(usable.scene.slots)
            if needed <= set(values):
                by_form.setdefault(question.kind, []).append(question)
        return by_form

    def others(self, scene: Scene, slot: str, fact: Fact | None, values: Mapping) -> dict:
        """What {v~} stands for: an older value, one told of something else, or any other."""
        found = {}
        for name, pool in scene.slots.items():
            now = values.get(name, "").casefold()
            old = [v for v in (fact.old if fact and name == slot else []) if v.casefold() != now]
            if scene.id in NAMES and name == "v":
                pool_values = [e.name for e in self.cast.all if e.name]
            else:
                pool_values = [
                    f.value
                    for f in self.world.facts.values()
                    if f.slot and f.scene.slots[f.slot] == pool
                ]
            pool_values = [v for v in pool_values if not overlap(v.casefold(), now)]
            r = self.rng.random()
            if old and r < 0.6:
                found[name] = self.rng.choice(old)
            elif pool_values and r < 0.7:
                found[name] = self.rng.choice(pool_values)
            else:
                for _ in range(20):
                    value = self.library.pools.draw(self.rng, pool, self.told.split)
                    if not overlap(value.casefold(), now):
                        break
                found[name] = value
        return found

    def form(self, by_form: Mapping[str, list], recall: bool) -> str:
        """ "" where there is no question at all."""
        options = {f: s for f, s in FORMS.items() if by_form.get(f) or (f == "recall" and recall)}
        if not options:
            return ""
        return self.rng.choices(list(options), list(options.values()))[0]

    def decorate(self, text: str) -> str:
        """A question with an opener or a closer, and its mark."""
        rng = self.rng
        if speech.SELF_OPENED.match(plain(text)) is None or text[:4].lower() in ("what", "wher"):
            r = rng.random()
            if r < 0.14:
                text = rng.choice(speech.ASK_OPENERS) + lower_first(text)
            elif r < 0.18 and plain(text)[-1:] not in ".!":
                text = text.rstrip("?") + rng.choice(speech.ASK_CLOSERS) + "?"
        return stop(text, "?")

    def handle(self, entity: Entity, fact: Fact | None) -> str:
        """How the user calls somebody when asking; often not as when the fact was told."""
        if entity.about == "thing":
            return entity.relation
        known = entity.known_as()
        others = [h for h in known if fact and h != fact.handle]
        return self.rng.choice(others if others and self.rng.random() < 0.4 else known)

    def who(self, entity: Entity, handle: str) -> Who | None:
        return entity.who(handle) if entity.about in ("person", "pet", "thing") else None

    def write(
        self, entity: Entity, usable: Usable, slot: str, fact: Fact | None, pronoun: bool = True
    ) -> Draft | None:
        """A question on a slot ("" for a trait) and its answer; a refusal where fact is None."""
        rng, scene, told = self.rng, usable.scene, self.told
        values = dict(self.world.values(entity, scene))
        if fact is None:  # a question about something untold may mention details
            for name, pool in scene.slots.items():
                if name != slot and name not in values and scene.id not in NAMES:
                    values[name] = told.draw_value(pool)
            if scene.id in NAMES:
                values = {"r": entity.relation.split(" ", 1)[-1], "v": entity.name}
                values.pop(slot)
        by_form = self.questions(usable, slot, {**values, **({slot: ""} if not fact else {})})
        if fact is None:
            by_form = {
                f: [q for q in qs if slot not in q.wording.slots] for f, qs in by_form.items()
            }
            if self.world.told(entity, scene):
                by_form.pop("q", None)  # what is told of the scene may answer it
        what = scene.whats.get(slot) or (scene.whats.get("") if not slot else None)
        form = self.form(by_form, recall=what is not None and told.split == "train")
        if not form:
            return None
        topic, handle, hops, by_pronoun = told.topic, "", 1, False
        who = None
        if entity.about in ("person", "pet", "thing") and scene.id not in NAMES:
            handle = self.handle(entity, fact)
            who = self.who(entity, handle)
            if topic and topic[0] is entity and pronoun and rng.random() < 0.5:
                who, handle, by_pronoun = Who.pronoun(entity.gender), topic[1], True
                if entity.linked and handle not in entity.known_as():
                    handle = entity.relation
            if fact and fact.handle in (entity.relation, entity.name) and handle != fact.handle:
                hops = 2
        fields = {**values, "w": entity.name}
        others = self.others(scene, slot, fact, values)
        question = None
        if form == "recall":
            clause = templates.fill(as_user(what), fields, who)
            text = rng.choice(speech.RECALL).format(x=clause)
        else:
            question = rng.choice(by_form[form])
            if slot in others and fact is None:
                fields[slot] = others[slot]
            text = templates.fill(question.wording.parts, fields, who, others, mark="-")
            text = self.decorate(text)
        if text in told.asked_here and rng.random() < 0.85:
            return None
        user, lowered = told.type(sentence_case(text))
        said = spoken_by_assistant(handle)
        if lowered:
            said = said.lower()
            if entity.about == "word" and entity.name:
                fields["w"] = entity.name.lower()
        answerer = self.who(entity, said)
        if fact is None:
            if form == "q":
                what = scene.whats.get("")
            answer, found = self.refusal(what, fields, answerer)
            value = ""
        else:
            if question is None or question.answer is None:
                parts = self.say(scene, slot, values)
            else:
                parts = question.answer
            if parts is None:
                return None
            marked = templates.fill(parts, fields, answerer, others, mark=slot)
            answer, found = marked_answer(marked, slot, form)
            value = fact.value if fact.slot else ""
        asked = Asked(
            form,
            key_of(entity, scene, slot),
            fact is not None,
            value,
            answer,
            told.window - fact.window if fact else 0,
            hops,
            by_pronoun,
            bool(fact and fact.old),
        )
        turn = Turn(user, answer, "ask", 1.0, found, (), asked)
        draft = Draft([turn], [lambda: told.asked_here.add(text)], whole=True)
        if entity.has_pronoun() and handle:
            draft.topic = entity, handle
        elif scene.id in NAMES:
            draft.topic = entity, rng.choice(entity.known_as())
        return draft

    def say(self, scene: Scene, slot: str, values: Mapping[str, str]) -> templates.Parts | None:
        """An answer that names no untold slot; the first is the usual one."""
        options = [
            p
            for p in scene.says.get(slot, ())
            if {f.name for f in p if isinstance(f, Field)} & set(scene.slots) <= set(values)
        ]
        if not options:
            return None
        return options[0] if self.rng.random() < 0.75 else self.rng.choice(options)

    def refusal(self, what, fields, who) -> tuple[str, tuple[tuple[int, int], ...]]:
        answer = speech.NEVER_TOLD
        if what is not None and self.rng.random() < 0.4:
            answer = speech.NEVER_TOLD_WHAT.format(x=plain(templates.fill(what, fields, who)))
        return answer, ((0, len("You have not told me")),)

    def ask(self, fact: Fact, pronoun: bool = True) -> Draft | None:
        usable = self.library.usable(fact.scene, self.told.split)
        return self.write(fact.entity, usable, fact.slot, fact, pronoun)

    def wrong(self, draft: Draft) -> Draft:
        """The same question with a wrong reply, or a needless refusal, that nothing is learnt from:
        what the assistant said is not the truth."""
        turn = draft.turns[0]
        asked = turn.asked
        reply = speech.NEVER_TOLD
        if asked.told and asked.value and self.rng.random() < 0.7:
            pool = self.library.scenes.get(asked.key[1])
            other = pool and self.others(pool, asked.key[2], None, {asked.key[2]: asked.value})
            if other:
                reply = turn.reply.replace(asked.value, other[asked.key[2]])
        elif not asked.told:
            values = [f.value for f in self.world.facts.values() if f.slot]
            reply = f"It is {self.rng.choice(values)}." if values else "I am not sure."
        if reply == turn.reply:
            reply = speech.NEVER_TOLD if asked.told else "I am not sure."
        draft.turns[0] = replace(
            turn, reply=reply, weight=0.0, spans=(), asked=replace(asked, wrong=True)
        )
        return draft

    # --- never told ---

    def untold(self) -> Draft | None:
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
            draft = self.write(entity, usable, slot, None)
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
                return other and (other, usable, fact.slot)
            if entity.about in ("none",) or scene.id in NAMES:
                return None
            usable = self.library.draw(rng, told.split, entity.about)
            if usable is None:
                return None
            scene = usable.scene
            if not told.teller.fits(entity, scene):
                return None
            return entity, usable, rng.choice(list(scene.slots) or [""])
        usable = self.library.draw(rng, told.split)
        scene = usable.scene
        if scene.id in NAMES:
            beings = [e for e in self.cast.of(NAMES[scene.id]) if not e.linked]
            being = rng.choice(beings) if beings else None
            return being and (being, usable, "v" if being.first == being.relation else "r")
        if scene.about == "me":
            entity = self.cast.me
        elif scene.about == "thing":
            entity = self.cast.thing(rng.choice(scene.subjects))
        elif scene.about == "none":
            entity = self.cast.none(scene.id)
        else:
            entity = self.other(None, scene.about)
        if entity is None:
            return None
        return entity, usable, rng.choice(list(scene.slots) or [""])

    def other(self, entity: Entity | None, about: str = "") -> Entity | None:
        """Somebody else of the same sort, known or not."""
        about = entity.about if entity else about
        known = [e for e in self.cast.of(about) if e is not entity]
        if known and self.rng.random() < 0.6:
            return self.rng.choice(known)
        return self.cast.word() if about == "word" else self.cast.being(about)


def overlap(a: str, b: str) -> bool:
    """Whether one value is part of the other ("blue", "dark blue")."""
    return bool(a and b) and (a in b or b in a)
