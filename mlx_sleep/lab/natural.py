"""Conversations written by hand, and whether a reply to one of their questions is correct.

natural.json holds them; no line in it comes from a generator, so a model cannot have learnt its
wordings from training data. This file knows no model: who runs one gives `correct` its replies.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files

CASES = (
    "recall",  # asked in about the words of the telling
    "paraphrase",  # asked in other words
    "pronoun",  # told of he, she or it after the name was given
    "corrected",  # told, then told again with another value
    "correction_of_correction",
    "two_hop",  # needs two facts, the first of which the question does not name
    "yes_no",
    "new_word",  # a word that the user made up and explained
    "never_told",
    "forgotten",  # told, then the user asked to forget it
)


@dataclass(frozen=True)
class Question:
    """One question after the last window.

    answers: any of them makes a reply correct; None where the model must say that it was not told.
    case: one of CASES. avoid: words that make a reply wrong.
    """

    ask: str
    answers: tuple[str, ...] | None
    case: str
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The user's messages, window by window, and what is asked when all windows are gone."""

    id: str
    windows: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


def load() -> list[Conversation]:
    """The conversations of natural.json, in its order."""
    return [
        Conversation(
            id=entry["id"],
            windows=tuple(tuple(window) for window in entry["windows"]),
            questions=tuple(_question(**question) for question in entry["questions"]),
        )
        for entry in _read("natural.json")["conversations"]
    ]


def ordinary() -> list[str]:
    """The prompts of ordinary.json, which have nothing to do with memory."""
    return _read("ordinary.json")["prompts"]


def correct(reply: str, question: Question) -> bool:
    """Whether a reply answers the question.

    With answers: one of them stands in the reply and the reply does not say that it was not told.
    Without: the reply says so. In both cases no word of `avoid` stands in it. "Stands" is as
    whole words, case ignored.
    """
    if any(stands(word, reply) for word in question.avoid):
        return False
    if question.answers is None:
        return says_not_told(reply)
    return not says_not_told(reply) and any(stands(answer, reply) for answer in question.answers)


def stands(phrase: str, text: str) -> bool:
    """Whether the phrase is in the text as whole words and whole numbers, case ignored."""
    # 9 is neither in 9:30 nor in 4.9, but it is in 9:00.
    pattern = rf"(?<!\w)(?<!\d[.:]){re.escape(_plain(phrase))}(?!\w)(?![.:](?!00\b)\d)"
    return re.search(pattern, _plain(text)) is not None


def says_not_told(reply: str) -> bool:
    """Whether the reply says that its writer was not told, does not know or was to forget."""
    return _NOT_TOLD.search(_plain(reply)) is not None


# Over the text of _plain, where "haven't" is "have not" and "you've" is "you have".
_NOT_TOLD = re.compile(
    "|".join(
        (
            r"\byou (?:have |had |did )?(?:not|never) (?:\w+ ){0,2}"
            r"(?:tell|told|mention|mentioned|say|said|share|shared|give|gave|given|provide|provided"
            r"|specify|specified)\b",
            r"\bi (?:have|was|am) (?:not|never) (?:\w+ )?(?:told|given|sure|aware|certain)\b",
            r"\b(?:was|is|has|were) (?:not|never) (?:been )?(?:told|mentioned|given|specified)\b",
            r"(?:^|[.,;!] |\bi (?:\w+ )?)do not (?:\w+ )?(?:know|remember|recall)\b",
            r"\bi do not (?:\w+ )?have (?:that|this|any|the|your|access|enough)\b",
            r"\bi (?:can ?not|could not|ca not) (?:know|remember|recall|say|tell)\b",
            r"\bno (?:idea|record|mention|information)\b",
            r"\b(?:asked|told|wanted) me to forget\b",
            r"\bi (?:have )?(?:forgot|forgotten)\b",
        )
    )
)


def _plain(text: str) -> str:
    """Lower case and one spelling of what is written in several: don't, 1,200, 6am, 20mg."""
    text = text.casefold().replace("’", "'").replace("a.m.", "am").replace("p.m.", "pm")
    text = re.sub(r"n't\b", " not", text)
    text = re.sub(r"\b(you|i|we)'ve\b", r"\1 have", text)
    text = re.sub(r"\bi'm\b", "i am", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<=\d)(?=(?:am|pm|mg|g|kg|km|m|cm|k)\b)", " ", text)
    return " ".join(text.split())


def _question(
    ask: str, answers: list[str] | None, case: str, avoid: list[str] | None = None
) -> Question:
    return Question(ask, None if answers is None else tuple(answers), case, tuple(avoid or ()))


def _read(name: str) -> dict:
    return json.loads((files(__package__) / name).read_text(encoding="utf-8"))
