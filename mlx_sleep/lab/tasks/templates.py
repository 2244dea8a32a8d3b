"""Wordings with fields in braces: parsed once, filled often.

A filled text is *marked*: control characters enclose each value and each name, so that whoever
spoils the spelling leaves them alone and whoever encodes the text finds the value again.
Knows neither scenes nor people beyond the forms in which somebody is spoken of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

VALUE, VALUE_END, KEEP, KEEP_END = "\x01", "\x02", "\x03", "\x04"
PRONOUNS = ("he", "him", "his", "himself")
_FORMS = {
    "he": ("he", "him", "his", "himself"),
    "she": ("she", "her", "her", "herself"),
    "it": ("it", "it", "its", "itself"),
}
_BRACES = re.compile(r"\{([^{}]*)\}")
_FIELD = re.compile(r"(?P<article>[aA]n? )?(?P<name>\w+)(?P<case>'s|\.o|~)?")
# Written with a vowel but said with a consonant, and the other way round.
_CONSONANT = re.compile(r"(?i)(uni(?!n)|u[st][aeiu]|eu|one\b|uk|ur[aeiou]|ufo|u-)")
_VOWEL = re.compile(r"(?i)([aeiou]|hour|honest|honou?r|heir|8|11\b|18\b|x-ray|mri\b|mba\b|fm\b)")


class Field(NamedTuple):
    """One field. name: a slot, "s", "w" or a pronoun. case: "", "'s", ".o" or "~" (another value
    of the slot). upper: first letter upper-case. article: with "a" or "an" before it."""

    name: str
    case: str
    upper: bool
    article: str


@dataclass(frozen=True)
class Who:
    """How somebody is spoken of in a sentence. keep: the part that is a name, never respelled."""

    subject: str
    possessive: str
    object: str
    gender: str  # he, she or it
    keep: str = ""

    @classmethod
    def called(cls, handle: str, gender: str, keep: str = "") -> Who:
        return cls(handle, handle + "'s", handle, gender, keep)

    @classmethod
    def pronoun(cls, gender: str) -> Who:
        he, him, his, _ = _FORMS[gender]
        return cls(he, his, him, gender)

    def form(self, name: str, case: str) -> str:
        if name == "s":
            text = {"'s": self.possessive, ".o": self.object}.get(case, self.subject)
            return text.replace(self.keep, KEEP + self.keep + KEEP_END) if self.keep else text
        return _FORMS[self.gender][PRONOUNS.index(name)] + ("'s" if case == "'s" else "")


Parts = tuple["str | Field", ...]


def parse(text: str, names: set[str]) -> Parts:
    """The parts of a wording. names: fields that may stand in it, in lower case. ValueError says
    what is wrong."""
    parts: list[str | Field] = []
    end = 0
    for match in _BRACES.finditer(text):
        field = _FIELD.fullmatch(match.group(1))
        name = field["name"] if field else ""
        lower = name if name in names else name[:1].lower() + name[1:]
        if not field or lower not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ValueError(f"unknown field {{{match.group(1)}}}; fields here: {known}")
        parts.append(text[end : match.start()])
        upper = name != lower
        parts.append(Field(lower, field["case"] or "", upper, (field["article"] or "").strip()))
        end = match.end()
    parts.append(text[end:])
    if any(isinstance(p, str) and ("{" in p or "}" in p) for p in parts):
        raise ValueError("a brace without its partner")
    return tuple(p for p in parts if p != "")


def article(word: str) -> str:
    vowel = _VOWEL.match(word) and not _CONSONANT.match(word)
    return "an" if vowel else "a"


def upper_first(text: str) -> str:
    """Upper-cases the first letter; a mark before it makes no difference."""
    i = 1 if text[:1] in (VALUE, KEEP) else 0
    return text[:i] + text[i : i + 1].upper() + text[i + 1 :]


def fill(
    parts: Parts,
    values: Mapping[str, str],
    who: Who | None = None,
    others: Mapping[str, str] | None = None,
    mark: str | None = None,
) -> str:
    """The marked text. others: what {v~} stands for. mark: the slot whose value gets value marks
    (None: all slots); values of the rest are only kept from misspelling."""
    out = []
    for part in parts:
        if isinstance(part, str):
            out.append(part)
            continue
        if part.name == "s" or part.name in PRONOUNS:
            assert who is not None  # a wording with {s} is of somebody
            text = who.form(part.name, part.case)
        elif part.name == "w":
            text = KEEP + values["w"] + KEEP_END + (part.case if part.case == "'s" else "")
        else:
            other = part.case == "~"
            source = others if other else values
            assert source is not None  # {v~} needs others
            value = source[part.name]
            if mark in (None, part.name) and not other:
                text = VALUE + value + VALUE_END
            else:
                text = KEEP + value + KEEP_END
            text += "'s" if part.case == "'s" else ""
        if part.upper:
            text = upper_first(text)
        if part.article:
            word = article(plain(text))
            out.append((word.title() if part.article[0] == "A" else word) + " ")
        out.append(text)
    return "".join(out)


def sentence_case(text: str) -> str:
    """Upper-cases the first letter of each sentence, but never that of a value or a name."""
    text = re.sub(r"([.!?]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text[:1].upper() + text[1:]


_MARKS = str.maketrans("", "", VALUE + VALUE_END + KEEP + KEEP_END)


def plain(text: str) -> str:
    return text.translate(_MARKS)


def spans(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without marks, and (start, end) in characters of each value in it."""
    out, found, start, at = [], [], 0, 0
    for piece in re.split("([\x01\x02\x03\x04])", text):
        if piece == VALUE:
            start = at
        elif piece == VALUE_END:
            found.append((start, at))
        elif piece not in (KEEP, KEEP_END):
            out.append(piece)
            at += len(piece)
    return "".join(out), tuple(found)
