"""Facts, which of them hold, and their wording from the templates of phrases.py.

Knows no conversation: not who tells a fact, when, or how carelessly.
"""

from __future__ import annotations

from typing import NamedTuple

from . import phrases
from .phrases import KINDS, Kind

BY_SUBJECT: dict[str, list[Kind]] = {}
for _k in KINDS:
    BY_SUBJECT.setdefault(_k.subject, []).append(_k)
WEIGHTS = [k.weight for k in KINDS]
LINKS = {k.subject: k for k in KINDS if k.link}
PERSON_LIKE = {"person": "kin", "pet": "petlink"}  # a named subject and the link that names it
_PLURALS = set("keys glasses gloves headphones scissors savings letters binoculars".split())


class Fact(NamedTuple):
    subject: str  # "user", "my sister", "Mirek", "florp"
    kind: Kind
    topic: str  # "colour" of a favourite colour; the relation of a link; else ""
    value: str

    @property
    def key(self) -> tuple[str, str, str]:
        return fact_key(self.subject, self.kind, self.topic)


def canonical(subject: str) -> str:
    """One name for each subject: case and "mum" for "mother" make no difference."""
    subject = subject.lower()
    return phrases.SAME.get(subject, subject)


def fact_key(subject: str, kind: Kind, topic: str) -> tuple[str, str, str]:
    """What a fact is about. A link's topic ("sister") is in its subject already."""
    return canonical(subject), kind.attr, "" if kind.link else topic


class World:
    """Everything told so far; the newest value of a fact holds."""

    def __init__(self) -> None:
        self.facts: dict[tuple[str, str, str], Fact] = {}
        self.corrected: set[tuple[str, str, str]] = set()
        self.owners: dict[str, str] = {}  # name -> the subject that it names

    def tell(self, fact: Fact) -> None:
        old = self.facts.get(fact.key)
        if old:
            self.corrected.add(fact.key)
            self.owners.pop(canonical(old.value), None)
        self.facts[fact.key] = fact
        if fact.kind.link and fact.kind.attr == "name":
            self.owners[canonical(fact.value)] = fact.subject

    def resolve(self, subject: str, kind: Kind, topic: str) -> tuple[Fact, int] | None:
        """The fact that answers, and how many facts that takes. Two: "my sister" by her name, a
        name by whose it is, or a made-up word by the word that it is a kind of."""
        subject, attr, topic = fact_key(subject, kind, topic)
        if (subject, attr, topic) in self.facts:
            return self.facts[subject, attr, topic], 1
        links = [self.facts.get((subject, a, "")) for a in ("name", "kind")]
        others = [link.value for link in links if link and link.kind.link]
        if subject in self.owners:
            others.append(self.owners[subject])
        for other in others:
            fact = self.facts.get((canonical(other), attr, topic))
            if fact:
                return fact, 2
        return None


def article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def fill(template: str, subject: str, topic: str, value: str = "") -> str:
    """The sentence in sentence-inner case."""
    return template.format(
        v=value,
        av=article(value),
        t=topic,
        s=subject,
        p=subject + "'s",
        at=article(subject),
        be="are" if topic in _PLURALS else "is",
    )


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def capitalize(text: str, template: str, kind: Kind) -> str:
    """Upper-cases a sentence's first letter, but never that of a value or of a made-up word."""
    made_up = template.startswith("{s}") and kind.subject in ("word", "verb", "adjective")
    if template.startswith("{v}") or made_up:
        return text
    return upper_first(text)


def reply_parts(kind: Kind, subject: str, topic: str, value: str) -> tuple[str, str]:
    """The canonical reply as (all before the value, the value): the value comes last."""
    spoken = "Your " + subject[3:] if subject.startswith("my ") else subject
    head = kind.reply.split("{v}")[0] if "{v}" in kind.reply else kind.reply.split("{av}")[0]
    head = head.format(
        Y=spoken,
        s=subject,
        t=topic,
        At=article(subject).capitalize(),
        be="are" if topic in _PLURALS else "is",
    )
    if "{av}" in kind.reply:
        head += article(value)[: -len(value)]
    return head.rstrip(), value
