"""What a user asks, and the true answer: about facts of any age, and about what was never told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import speech, templates
from .drafts import Draft, Told
from .library import NAMES, Usable, slots_mentioned
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
        two_hop = self.told.level.two_hop
        facts = list(self.world.facts.values())
        if two_hop and self.rng.random() < two_hop:
            facts = [f for f in facts if self.other_handles(f)] or facts
        for fact in facts:
            age = self.told.window - fact.window
            if ages is None or ages[0] <= age <= ages[1]:
                by_age.setdefault(age, []).append(fact)
        if not by_age:
            return None
        found = sorted(by_age)
        weights = [1 + age / (1 + found[-1]) for age in found]  # the oldest are the hardest
        return self.rng.choice(by_age[self.rng.choices(found, weights)[0]])

    # --- questions ---

    def questions(
        self,
        entity: Entity,
        usable: Usable,
        slot: str,
        fact: Fact | None,
        values: Mapping[str, str],
        others: Mapping[str, str],
    ) -> dict[str, list[Question]]:
        """Questions on a slot by form: those that need no untold slot."""
        known = {*values, slot} if fact is None else set(values)
        by_form: dict[str, list[Question]] = {}
        for question in (*usable.questions.get(slot, ()), *usable.questions.get("", ())):
            if fact is None and slot in question.wording.slots:
                continue
            if not slots_mentioned(question) & set(usable.scene.slots) <= known:
                continue
            if question.wording.others <= set(others):
                by_form.setdefault(question.kind, []).append(question)
        if fact is None and self.world.told(entity, usable.scene):
            by_form.pop("q", None)  # what is told of the scene may answer it
        return by_form

    def others(self, scene: Scene, slot: str, fact: Fact | None, values: Mapping) -> dict:
        """What {v~} stands for: an older value, one told of something else, or any other. A slot
        whose pool has no other value is left out."""
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
            elif self.library.pools.usable(pool, self.told.values):
                for _ in range(20):
                    value = self.library.pools.draw(self.rng, pool, self.told.values)
                    if not overlap(value.casefold(), now):
                        found[name] = value
                        break
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
        others = self.other_handles(fact) if fact else []
        share = max(0.4, self.told.level.two_hop)
        known = entity.known_as()
        return self.rng.choice(others if others and self.rng.random() < share else known)

    def other_handles(self, fact: Fact) -> list[str]:
        """How the subject of a fact is known too: a question by one of these takes two hops."""
        if fact.entity.about == "thing" or fact.scene.id in NAMES:
            return []
        return [h for h in fact.entity.known_as() if h != fact.handle]

    def who(self, entity: Entity, handle: str) -> Who | None:
        return entity.who(handle) if entity.about in ("person", "pet", "thing") else None

    def write(
        self, entity: Entity, usable: Usable, slot: str, fact: Fact | None, pronoun: bool = True
    ) -> Draft | None:
        """A question on a slot ("" for a trait) and its answer; a refusal where fact is None. None
        where the split's wordings do not suffice."""
        rng, scene, told = self.rng, usable.scene, self.told
        values = self.values(entity, scene, slot, fact)
        others = self.others(scene, slot, fact, values)
        by_form = self.questions(entity, usable, slot, fact, values, others)
        what = scene.whats.get(slot) or (scene.whats.get("") if not slot else None)
        form = self.form(by_form, recall=what is not None and told.split == "train")
        if not form:
            return None
        question = None if form == "recall" else rng.choice(by_form[form])
        who, handle, by_pronoun = self.speak_of(entity, scene, fact, pronoun)
        fields = {**others, **values, "w": entity.name}
        if question is None:
            assert what is not None  # else the form is not "recall"
            clause = templates.fill(as_user(what), fields, who)
            text = rng.choice(speech.RECALL).format(x=clause)
        else:
            text = templates.fill(question.wording.parts, fields, who, others, mark="-")
            text = self.decorate(text)
        if text in told.asked_here and rng.random() < 0.85:
            return None
        user, lowered = told.type(sentence_case(text))
        if lowered:
            fields["w"] = fields["w"].lower()
        said = spoken_by_assistant(handle.lower() if lowered else handle)
        answerer = self.who(entity, said)
        if fact is None:
            if form == "q":
                what = scene.whats.get("")
            answer, found = self.refusal(what, fields, answerer)
        else:
            fixed = question.answer if question else None
            parts = fixed or self.say(scene, slot, values)
            if parts is None:
                return None
            marked = templates.fill(parts, fields, answerer, others, mark=slot)
            answer, found = marked_answer(marked, slot, form)
        told_by = fact.handle if fact else ""
        asked = Asked(
            form,
            key_of(entity, scene, slot),
            told=fact is not None,
            value=fact.value if fact and fact.slot else "",
            answer=answer,
            age=told.window - fact.window if fact else 0,
            hops=2 if told_by in entity.known_as() and handle not in ("", told_by) else 1,
            pronoun=by_pronoun,
            corrected=bool(fact and fact.old),
        )
        draft = Draft([Turn(user, answer, "ask", 1.0, found, (), asked)], whole=True)
        draft.changes.append(lambda: told.asked_here.add(text))
        if entity.has_pronoun():
            draft.topic = entity, handle or rng.choice(entity.known_as())
        return draft

    def values(self, entity: Entity, scene: Scene, slot: str, fact: Fact | None) -> dict[str, str]:
        """The slots that a question may mention: those told and, in a question about something
        untold, invented ones."""
        if fact is None and scene.id in NAMES:
            names = {"r": entity.relation.split(" ", 1)[-1], "v": entity.name}
            return {name: value for name, value in names.items() if name != slot}
        values = self.world.values(entity, scene)
        if fact is None:
            for name, pool in scene.slots.items():
                if name != slot and name not in values:
                    values[name] = self.told.draw_value(pool)
        return values

    def speak_of(
        self, entity: Entity, scene: Scene, fact: Fact | None, pronoun: bool
    ) -> tuple[Who | None, str, bool]:
        """How the question calls its subject, which handle the answer uses, and whether the
        question uses a pronoun."""
        if entity.about not in ("person", "pet", "thing") or scene.id in NAMES:
            return None, "", False
        topic = self.told.topic
        if pronoun and topic and topic[0] is entity and self.rng.random() < 0.5:
            known = entity.known_as()
            handle = topic[1] if topic[1] in known else known[0]
            return Who.pronoun(entity.gender), handle, True
        handle = self.handle(entity, fact)
        return self.who(entity, handle), handle, False

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
        assert asked is not None  # it is a question
        reply = speech.NEVER_TOLD
        if asked.told and asked.value and self.rng.random() < 0.7:
            pool = self.library.scenes.get(asked.key[1])
            other = pool and self.others(pool, asked.key[2], None, {asked.key[2]: asked.value})
            if other and asked.key[2] in other:
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


def overlap(a: str, b: str) -> bool:
    """Whether one value is part of the other ("blue", "dark blue")."""
    return bool(a and b) and (a in b or b in a)
