"""Sentences: how clauses become a message, and how a question is turned round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from . import speech
from .templates import Parts, plain, sentence_case, spans, upper_first


def simple(text: str) -> bool:
    """Whether a clause can be joined to another by "and"."""
    words = plain(text)
    return not re.search(r"[.!?:;]|, (and|but|so)\b", words) and len(words.split()) <= 12


def lower_first(text: str) -> str:
    word = re.match(r"[A-Za-z']+", text)
    if word and (word[0].split("'")[0] in speech.STARTERS):
        return text[:1].lower() + text[1:]
    return text


def stop(text: str, mark: str = ".") -> str:
    return text if plain(text)[-1:] in ".!?" else text + mark


def join(rng: Random, clauses: Sequence[str]) -> str:
    """The clauses as one text: joined by "and", or as sentences."""
    text = clauses[0]
    for before, clause in zip(clauses, clauses[1:], strict=False):
        following = lower_first(clause)
        opened = speech.SELF_OPENED.match(plain(following))
        if simple(before) and simple(clause) and not opened and rng.random() < 0.6:
            text += rng.choice(speech.JOINTS) + following
        else:
            link = ". " if opened else rng.choice(speech.BREAKS)
            if plain(text)[-1:] in ".!?":
                text, link = text.rstrip(" "), link.lstrip(".!") if link[:1] in ".!" else " "
                link = link if link.startswith(" ") else " "
            text += link + (upper_first(following) if link[-2:-1] in ".!" else following)
    return text


# The assistant's words about the user, and the user's own.
_FLIPS = {
    "you are": "I am",
    "you're": "I'm",
    "you were": "I was",
    "you": "I",
    "your": "my",
    "yours": "mine",
    "yourself": "myself",
    "me": "you",
    "my": "your",
}
_BEFORE_OBJECT = """to for with of at about from on by than near gave give gives told call calls pay
pays pick picks owe owes send sent sends lend lent meet meets"""
_OBJECT = re.compile(rf"\b({'|'.join(_BEFORE_OBJECT.split())}) you\b|\byou$")
_FLIP = re.compile(r"\b(you are|you're|you were|you|your|yours|yourself|me|my)\b")


def as_user(parts: Parts) -> Parts:
    """A clause such as "where you live" as the user says it: "where I live"."""
    out = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            last = i == len(parts) - 1
            text = _FLIP.sub(lambda m: _FLIPS[m[0]], _hide_objects(part, last))
            part = text.replace("\0", "me")
        out.append(part)
    return tuple(out)


def _hide_objects(text: str, last: bool) -> str:
    """Puts a zero byte for each "you" that is an object: it becomes "me"."""
    return _OBJECT.sub(
        lambda m: f"{m[1]} \0" if m[1] else "\0" if last else m[0],
        text,
    )


def marked_answer(text: str, slot: str, form: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The answer without marks, and the spans that it hangs on: its value, and its yes or no."""
    text = sentence_case(text)
    answer, found = spans(text)
    first = re.match(r"(Yes|No)\b", answer)
    if form in ("yes", "no", "q") and first:
        found = (first.span(), *(found if form != "yes" else ()))
    elif not found:
        found = ((0, len(answer.rstrip(".!"))),)
    return answer, found
