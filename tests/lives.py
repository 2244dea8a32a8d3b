"""What the tests of lives share: a tokenizer of words, and a replay of a life from its turns."""

from __future__ import annotations

import re

from mlx_sleep.lab.tasks.life import Level, Life, Lives, default_library
from mlx_sleep.lab.tasks.life_tokens import LifeEncoder, Template

LIBRARY = default_library()
LEVELS = [
    Level(windows=1, window_tokens=128),
    Level(windows=4, window_tokens=96, cut=1.0),
    Level(windows=6, window_tokens=160, noise=1.0, quick_fix=0.3),
    Level(windows=16, window_tokens=128, facts=(2, 8), asking=0.4, wrong=0.3),
]
CHAT = [[(f"question {i}?", "An answer. " * (i % 7 + 1))] for i in range(40)]


class Words:
    """A tokenizer that is exact and reversible: one id for each word with the space before it."""

    def __init__(self):
        self.ids: dict[str, int] = {"": 0}
        self.texts: list[str] = [""]

    def encode(self, text: str):
        ids, offsets = [], []
        for match in re.finditer(r"<\|\w+\|>| ?\w+|\s|[^\w\s]", text):
            if match[0] not in self.ids:
                self.ids[match[0]] = len(self.texts)
                self.texts.append(match[0])
            ids.append(self.ids[match[0]])
            offsets.append(match.span())
        return ids, offsets

    def decode(self, ids) -> str:
        return "".join(self.texts[i] for i in ids)


def make(split: str = "train", seed: int = 0, chat=CHAT) -> tuple[Lives, Words]:
    words = Words()
    encoder = LifeEncoder(words.encode, Template.chatml(words.encode))
    return Lives(encoder, split, seed, chat, LIBRARY), words


def replay(life: Life) -> list[str]:
    """What is wrong with a life's answers, judged by nothing but its turns."""
    holds: dict[tuple, tuple[str, int]] = {}
    doubted: set[tuple] = set()
    faults = []
    for number, window in enumerate(life.windows):
        for turn in window.turns:
            for event in turn.events:
                if event.value is None:
                    holds.pop(event.key, None)
                    (doubted.discard if event.forgotten else doubted.add)(event.key)
                    continue
                holds[event.key] = event.value, number
                doubted.discard(event.key)
                if event.key[2] and event.value.casefold() not in turn.user.casefold():
                    faults.append(f"{event.value!r} is not in {turn.user!r}")
            asked = turn.asked
            if asked is None:
                continue
            value, when = holds.get(asked.key, (None, number))
            if asked.key in doubted or asked.told != (value is not None):
                faults.append(f"{turn.user!r}: told is {asked.told}, but {value!r} holds")
                continue
            if asked.form == "q" and not asked.told and any(k[:2] == asked.key[:2] for k in holds):
                faults.append(f"{turn.user!r}: something is told of {asked.key}")
            refused = asked.answer.startswith("You have not told me")
            if refused == asked.told:
                faults.append(f"{turn.user!r} -> {asked.answer!r}, but {value!r} holds")
            if asked.told and asked.key[2] and (asked.value, asked.age) != (value, number - when):
                faults.append(f"{turn.user!r}: {asked.value!r}, but {value!r} holds")
            if asked.told and asked.form in ("ask", "recall") and asked.value:
                if asked.value.casefold() not in asked.answer.casefold():
                    faults.append(f"{asked.value!r} is not in {asked.answer!r}")
            if asked.told and asked.form == "no" and asked.value.casefold() in turn.user.casefold():
                faults.append(f"{turn.user!r} holds the true value {asked.value!r}")
            if asked.told and asked.form == "yes":
                if asked.value.casefold() not in turn.user.casefold():
                    faults.append(f"{turn.user!r} does not hold {asked.value!r}")
            if asked.wrong != (turn.reply != asked.answer) or asked.wrong != (turn.weight == 0):
                faults.append(f"{turn.user!r} -> {turn.reply!r}, weight {turn.weight}")
    return faults
