"""How a careless writer types: case, punctuation, apostrophes, spelling. Values and names keep
their letters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from .templates import KEEP, KEEP_END, VALUE, VALUE_END

_SPLIT = re.compile(f"({VALUE}[^{VALUE_END}]*{VALUE_END}|{KEEP}[^{KEEP_END}]*{KEEP_END})")
_APOSTROPHE = re.compile(
    r"(?i)\b(i|you|we|they|he|she|it|that|what|who|where|when|there|here|name|don|can|won|isn|"
    r"doesn|didn|wasn|aren|haven|hasn|couldn|wouldn|shouldn)'(m|re|ve|s|t|ll|d)\b"
)
_SHORT = {
    "you": "u",
    "your": "ur",
    "please": "pls",
    "because": "cuz",
    "thanks": "thx",
    "tomorrow": "tmrw",
    "about": "abt",
    "though": "tho",
    "really": "rly",
    "with": "w/",
    "and": "&",
}
_AMERICAN = (("avourite", "avorite"), ("colour", "color"), ("eighbour", "eighbor"), ("mum", "mom"))
_LONG = (
    (r"\bI'm\b", "I am"),
    (r"\b([Ww]hat|[Ww]ho|[Ww]here)'s\b", r"\1 is"),
    (r"\b([Dd]o|[Dd]oes|[Dd]id)n't\b", r"\1 not"),
    (r"\bI've\b", "I have"),
    (r"\bcan't\b", "cannot"),
)


@dataclass(frozen=True)
class Style:
    """One writer's habits, as shares of messages."""

    lower: float = 0.0
    lower_values: float = 0.0
    no_stop: float = 0.0
    no_apostrophe: float = 0.0
    typos: float = 0.0
    short: float = 0.0
    american: bool = False
    formal: float = 0.0

    @classmethod
    def draw(cls, rng: Random, noise: float) -> Style:
        """noise: share of careless writers."""
        if rng.random() >= noise:
            return cls(
                lower=rng.choice((0.0, 0.0, 0.1)),
                no_stop=rng.choice((0.0, 0.1)),
                typos=rng.choice((0.0, 0.0, 0.03)),
                american=rng.random() < 0.4,
                formal=rng.choice((0.0, 0.0, 0.1, 0.8)),
            )
        return cls(
            lower=rng.choice((0.2, 0.6, 1.0, 1.0)),
            lower_values=rng.choice((0.0, 0.0, 0.0, 0.1, 0.5)),
            no_stop=rng.choice((0.3, 0.6, 0.95)),
            no_apostrophe=rng.choice((0.0, 0.4, 1.0)),
            typos=rng.choice((0.0, 0.1, 0.25, 0.5)),
            short=rng.choice((0.0, 0.0, 0.0, 0.4)),
            american=rng.random() < 0.5,
        )


def _typo(rng: Random, word: str) -> str:
    i = rng.randrange(1, len(word) - 1)
    r = rng.random()
    if r < 0.4:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if r < 0.75:
        return word[:i] + word[i + 1 :]
    return word[: i + 1] + word[i:]


def typed(rng: Random, style: Style, text: str, lower_values: bool) -> str:
    """The marked text as this writer types it. lower_values: values and names in lower case too."""

    def happens(share: float) -> bool:
        return share > 0 and rng.random() < share

    pieces = _SPLIT.split(text)
    loose = range(0, len(pieces), 2)  # the pieces between values and names

    def change(function) -> None:
        for i in loose:
            pieces[i] = function(pieces[i])

    if style.american:
        for a, b in _AMERICAN[:3]:
            change(lambda t, a=a, b=b: t.replace(a, b))
    if happens(style.formal):
        for a, b in _LONG:
            change(lambda t, a=a, b=b: re.sub(a, b, t))
    if happens(style.short):
        change(lambda t: re.sub(r"\b[a-z]+\b", lambda m: _SHORT.get(m[0], m[0]), t))
    if happens(style.no_apostrophe):
        change(lambda t: _APOSTROPHE.sub(lambda m: m[1] + m[2], t))
    if lower_values:
        pieces = [p.lower() for p in pieces]
    elif happens(style.lower):
        change(str.lower)
    if happens(style.no_stop):
        pieces[-1] = pieces[-1].rstrip(".?!")
    if happens(style.typos):
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.choice(loose)
            spots = [m for m in re.finditer(r"\b[a-z]{4,}\b", pieces[i])]
            if spots:
                m = rng.choice(spots)
                pieces[i] = pieces[i][: m.start()] + _typo(rng, m[0]) + pieces[i][m.end() :]
    return "".join(pieces)
