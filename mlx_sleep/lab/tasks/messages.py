"""What a user tells in a conversation of the task `memory`: the facts, and the messages.

Plans which facts are told and corrected, in which order and in whose words. Knows no tokens, and
neither windows nor questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from . import phrases, words
from .dialogue import Level, Turn
from .facts import (
    BY_SUBJECT,
    LINKS,
    PERSON_LIKE,
    WEIGHTS,
    Fact,
    World,
    article,
    canonical,
    capitalize,
    fact_key,
    fill,
    upper_first,
)
from .phrases import KINDS, Kind

_CHAINS, _CHAIN_WEIGHTS = (("kin", "person"), ("petlink", "pet"), ("word", "word")), (7, 2, 1)


@dataclass(eq=False)
class Draft:
    """Turns that stay together, with the facts that each tells."""

    turns: list[Turn]
    facts: list[tuple[Fact, ...]]
    needs: tuple[str, str, str] | None = None  # a correction needs its fact told before
    tokens: list[list[int]] = field(default_factory=list)  # of each turn; see Writer.measure

    @property
    def size(self) -> int:
        return sum(map(len, self.tokens))


def noisy(rng: Random, noise: float, text: str, names: Sequence[str] = ()) -> tuple[str, bool]:
    """`text` as a careless writer types it, with probability `noise`; the flag says that names were
    lower-cased too."""
    if rng.random() >= noise:
        return text, False
    lowered = False
    if rng.random() < 0.55:
        lowered = rng.random() < 0.4
        if lowered or not names:
            text = text.lower()
        else:
            kept = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
            text = re.sub(
                rf"({kept})|([^\W\d_]+)", lambda m: m.group(1) or m.group(2).lower(), text
            )
    if rng.random() < 0.6:
        text = text.rstrip(".?!")
    if rng.random() < 0.4:
        # A possessive keeps its apostrophe: "mireks" would be another name.
        text = re.sub(
            r"(?i)\b(i'm|(what|who|where|when|name|it)'s|(don|can)'t)\b",
            lambda m: m.group(0).replace("'", ""),
            text,
        )
    if rng.random() < 0.3:
        text = (
            text.replace("avourite", "avorite")
            .replace("colour", "color")
            .replace("neighbour", "neighbor")
        )
    return text, lowered


class Teller:
    """Plans the facts of one conversation and writes the messages that tell them."""

    def __init__(self, split: str, level: Level, rng: Random):
        self.split, self.level, self.rng = split, level, rng
        self.used: set[str] = set()  # values and made-up subjects, all distinct
        self.planned: dict[tuple[str, str, str], Fact] = {}  # what the drafts tell in the end
        self.people: dict[str, str] = {}  # subject -> person, pet or word

    # --- facts ---

    def value(self, kind: Kind, topic: str = "") -> str:
        """A value that this conversation has not used yet (unless its list is used up)."""
        pool = kind.pool
        if topic in phrases.MALE or topic in phrases.FEMALE:
            pool = "man" if topic in phrases.MALE else "woman"
        for _ in range(100):
            value = words.value(self.rng, pool, self.split)
            if value.lower() not in self.used:
                break
        self.used.add(value.lower())
        return value

    def fresh_word(self) -> str:
        while True:
            word = words.made_up(self.rng, self.split)
            if word not in self.used:
                self.used.add(word)
                return word

    def subject(self, kind: Kind, topic: str) -> str:
        """A subject for a single fact of `kind`; people are known by a relation or by a name."""
        rng = self.rng
        if kind.subject == "user":
            return "user"
        if kind.subject in ("kin", "petlink", "thinglink"):
            return "my " + topic
        if kind.subject in ("word", "verb", "adjective"):
            known = [s for s, c in self.people.items() if c == "word"]
            if kind.subject == "word" and known and rng.random() < 0.4:
                return rng.choice(known)
            return self.fresh_word()
        known = [s for s, c in self.people.items() if c == kind.subject]
        if known and rng.random() < 0.6:
            return rng.choice(known)
        if rng.random() < 0.5:
            return "my " + rng.choice(LINKS[PERSON_LIKE[kind.subject]].topics)
        return self.value(LINKS["kin"])

    def plan(self, kind: Kind, subject: str, topic: str, value: str | None = None) -> Fact | None:
        """A new fact, unless this subject's attribute is taken already, directly or by its name."""
        key = fact_key(subject, kind, topic)
        if key in self.planned:
            return None
        fact = Fact(subject, kind, topic, value or self.value(kind, topic))
        self.planned[key] = fact
        if kind.subject in ("person", "pet", "word"):
            self.people[subject] = kind.subject
        if kind.link and kind.subject in ("kin", "petlink"):
            named = "person" if kind.subject == "kin" else "pet"
            self.people[subject] = self.people[fact.value] = named
        return fact

    def single(self) -> Fact | None:
        """A fact of a random kind; None where it would tell again what is planned already."""
        kind = self.rng.choices(KINDS, WEIGHTS)[0]
        topic = self.rng.choice(kind.topics) if kind.topics else ""
        subject = self.subject(kind, topic)
        probe = World()
        for fact in self.planned.values():
            probe.tell(fact)
        if probe.resolve(subject, kind, topic):
            return None  # told already, or told about the same one under another name
        return self.plan(kind, subject, topic)

    def chains(self, count: int) -> list[tuple[Fact, Fact]]:
        """Up to `count` pairs (link, attribute of the linked name), all of one attribute, so that
        the answer can't be told from the attribute alone."""
        rng = self.rng
        link_class, attr_class = rng.choices(_CHAINS, _CHAIN_WEIGHTS)[0]
        link = LINKS[link_class]
        kinds = [k for k in BY_SUBJECT[attr_class] if not k.link]
        kind = rng.choices(kinds, [k.weight for k in kinds])[0]
        pairs: list[tuple[Fact, Fact]] = []
        for topic in rng.sample(link.topics, count) if link.topics else [""] * count:
            if topic:
                first = self.plan(link, "my " + topic, topic)
            else:  # "a florp is a kind of dask"
                first = self.plan(link, self.fresh_word(), "", self.fresh_word())
            if first is None:  # "my mum" after "my mother"
                continue
            second = self.plan(kind, first.value, "")
            assert second is not None  # nothing is planned of a new name
            pairs.append((first, second))
        return pairs

    # --- messages ---

    def sentence(self, fact: Fact, subject: str | None = None) -> tuple[str, str]:
        """(sentence in inner case, its template)"""
        template = self.rng.choice(fact.kind.tells)
        while fact.topic in phrases.ONLY_ONE and template.startswith("I have a {t}"):
            template = self.rng.choice(fact.kind.tells)
        return fill(template, subject or fact.subject, fact.topic, fact.value), template

    def told_turn(
        self, text: str, facts: Sequence[Fact], acks: Sequence[str]
    ) -> tuple[Turn, tuple[Fact, ...]]:
        """A tell turn, and its facts as they were typed."""
        names = [f.value for f in facts] + [f.subject for f in facts if f.subject[:3] != "my "]
        typed, lowered = noisy(self.rng, self.level.noise, text, names)
        if lowered:
            facts = [f._replace(value=f.value.lower()) for f in facts]
        ack = self.rng.choice(acks)
        if len(facts) == 1 and facts[0].kind.name == "user.name" and self.rng.random() < 0.3:
            ack = self.rng.choice(phrases.GREETINGS).format(v=facts[0].value)
        records = tuple((*f.key, f.value) for f in facts)
        return Turn(typed, ack, "tell", None, records), tuple(facts)

    def message(self, facts: Sequence[Fact], merge: bool = False) -> Draft:
        """One message that tells 1..3 facts."""
        rng = self.rng
        if merge:  # "My sister Mira lives in Oslo."
            link, fact = facts
            text = upper_first(self.sentence(fact, f"{link.subject} {link.value}")[0]) + "."
        else:
            parts = [self.sentence(f) for f in facts]
            if rng.random() < 0.15:
                opener = rng.choice(phrases.TELL_OPENERS)
                text = upper_first(opener) + parts[0][0]
            else:
                text = capitalize(*parts[0], facts[0].kind)
            for (part, template), fact in zip(parts[1:], facts[1:], strict=True):
                if rng.random() < 0.6:
                    text += rng.choice((" and ", " and ", ", and ", ", ")) + part
                else:
                    text += ". " + capitalize(part, template, fact.kind)
            text += "!" if rng.random() < 0.04 else "."
        turn, typed = self.told_turn(text, facts, phrases.ACKS)
        return Draft([turn], [typed])

    def correction(self, fact: Fact) -> Draft:
        """A message that replaces the value of `fact`."""
        rng = self.rng
        new = fact._replace(value=self.value(fact.kind, fact.topic))
        self.planned[fact.key] = new
        changes = fact.kind.changes
        if changes and rng.random() < 0.6:
            template = rng.choice(changes)
            text = fill(template, fact.subject, fact.topic, new.value)
        else:
            text, template = self.sentence(new)
        opener = rng.choice(phrases.FIX_OPENERS)
        if not opener and template not in changes:
            opener = "actually, "  # without a sign it would read like a second fact
        text = upper_first(opener) + text if opener else capitalize(text, template, fact.kind)
        turn, typed = self.told_turn(text + ".", [new], phrases.FIX_ACKS)
        return Draft([turn], [typed], needs=fact.key)

    def quick_fix(self, draft: Draft, fact: Fact) -> None:
        """Adds "sorry, I meant X" right after the only fact of `draft`."""
        new = fact._replace(value=self.value(fact.kind, fact.topic))
        self.planned[fact.key] = new
        shown = article(new.value) if "{av}" in fact.kind.reply else new.value
        template = self.rng.choice(phrases.FIX_SHORT)
        text = template.format(x=shown)
        if not template.startswith("{x}"):
            text = upper_first(text)
        turn, typed = self.told_turn(text + ".", [new], phrases.FIX_ACKS)
        draft.turns.append(turn)
        draft.facts.append(typed)

    def drafts(self) -> list[Draft]:
        """The messages that tell this conversation's facts and corrections, in order."""
        rng, level = self.rng, self.level
        total = rng.randint(*level.facts)
        groups: list[list[Fact]] = []
        merged: list[tuple[Fact, Fact]] = []
        left = total
        if left >= 4 and rng.random() < level.two_hop:
            for pair in self.chains(min(rng.randint(3, 4), left // 2)):
                left -= 2
                if pair[0].topic and rng.random() < 0.1:
                    merged.append(pair)
                else:
                    groups += [[pair[0]], [pair[1]]]
        attempts = 0
        while left > 0 and attempts < 200:
            attempts += 1
            fact = self.single()
            if fact is not None:
                groups.append([fact])
                left -= 1
        rng.shuffle(groups)
        drafts: list[Draft] = []
        i = 0
        while i < len(groups):
            size = rng.choices((1, 2, 3), (60, 32, 8))[0]
            facts = [g[0] for g in groups[i : i + size]]
            i += size
            drafts.append(self.message(facts))
        for pair in merged:
            drafts.insert(rng.randint(0, len(drafts)), self.message(pair, merge=True))
        for draft in list(drafts):
            for fact in draft.facts[0]:
                # A link whose name has facts of its own stays: who would those be about?
                named = fact.kind.link and canonical(fact.value) in {k[0] for k in self.planned}
                if named or rng.random() >= level.correction:
                    continue
                if len(draft.facts[0]) == 1 and len(draft.turns) == 1 and rng.random() < 0.3:
                    self.quick_fix(draft, fact)
                    continue
                fix = self.correction(fact)
                drafts.insert(rng.randint(drafts.index(draft) + 1, len(drafts)), fix)
        return drafts

    def talk(self) -> Draft:
        """Small talk."""
        user, assistant = self.rng.choice(phrases.TALK)
        text = upper_first(user)
        if text[-1] not in "?!":
            text += "." if self.rng.random() < 0.8 else "!"
        typed, _ = noisy(self.rng, self.level.noise, text)
        return Draft([Turn(typed, assistant, "talk")], [()])
