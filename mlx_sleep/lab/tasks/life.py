"""Lives: what a user tells and asks an assistant over windows, each of which ends in a sleep.

A life is a pure function of (seed, split, index, level), the same in every process. Only what the
fast weights keep crosses from one window to the next, so most questions are about windows whose
KV cache is gone. Knows a tokenizer only through LifeEncoder, and no model.

Preview: python -m mlx_sleep.lab.tasks.life --help
"""

from __future__ import annotations

import argparse
import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

from ...utils.errors import UserError
from . import scenes, speech, words
from .asker import Asker
from .drafts import Draft, Told
from .library import Library
from .life_tokens import LifeEncoder, Pieces, Template
from .noise import typed
from .old_kinds import old_kinds
from .teller import ACK_WEIGHT, Teller
from .templates import plain
from .untold import Untold
from .world import Fact, Turn

CHAT_WEIGHT = 0.3
SYSTEM_PROMPT = 0.85  # share of lives that open with the template's system prompt
# What is said next, by the theme of a window.
THEMES = {
    "telling": {"tell": 0.58, "fix": 0.07, "forget": 0.02, "ask": 0.22, "chat": 0.11},
    "mixed": {"tell": 0.32, "fix": 0.08, "forget": 0.03, "ask": 0.44, "chat": 0.13},
    "asking": {"ask": 0.9, "chat": 0.1},
    "last": {"tell": 0.1, "fix": 0.05, "forget": 0.02, "ask": 0.7, "chat": 0.13},
}
FORGET_THAT = 0.03  # share of tellings that are taken back at once
INSIST = 0.25  # share of wrong answers that the user puts right
MIXED = 0.06  # share of questions in a message that also tells something
MADE = 0.6  # share of chat between facts that is the base model's own, not small talk


class Exchange(NamedTuple):
    """Ordinary chat of a base model. complete: the reply ended by itself, it was not cut off."""

    user: str
    assistant: str
    complete: bool = True


CHAT = Sequence[Sequence[Exchange | tuple[str, str]]]


@dataclass(frozen=True)
class Level:
    """Difficulty of a life.

    windows: how many. window_tokens: most tokens of one. facts: least and most facts told in a
    window that tells. facts_per_message: how often a message tells 1, 2, 3 and 4. untold: share of
    questions about what was never told. wrong: share of wrong replies outside the last window.
    quick_fix: share of facts put right in the same message. noise: share of careless writers.
    asking, ordinary: share of windows with questions only, and with ordinary chat only. cut: share
    of boundaries inside a turn. re_asked: share of lives that come back to the same few facts.
    two_hop: share of messages and questions that are about beings with a name and a relation, told
    of one and asked by the other; 0 leaves it to chance, and changes no life.
    """

    windows: int = 2
    window_tokens: int = 192
    facts: tuple[int, int] = (1, 8)
    facts_per_message: tuple[float, ...] = (0.55, 0.27, 0.12, 0.06)
    untold: float = 0.17
    wrong: float = 0.1
    quick_fix: float = 0.04
    noise: float = 0.4
    asking: float = 0.2
    ordinary: float = 0.07
    cut: float = 0.1
    re_asked: float = 0.4
    two_hop: float = field(default=0.0, repr=False)  # repr(level) seeds the lives that there are

    def __post_init__(self):
        for name in ("facts", "facts_per_message"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 1 <= self.windows or self.window_tokens < 64:
            raise UserError("a life needs windows of at least 64 tokens, and at least one of them")


@dataclass
class Window:
    """turns: those that begin here. kl: ordinary chat only, held to the base model."""

    turns: list[Turn] = field(default_factory=list)
    pieces: Pieces = field(default_factory=Pieces)
    kl: bool = False


@dataclass
class Life:
    index: int
    windows: list[Window]

    def text(self) -> str:
        """The life to be read by people."""
        lines = []
        for i, window in enumerate(self.windows):
            kl = ", ordinary chat" if window.kl else ""
            lines.append(f"--- window {i} ({len(window.pieces)} tokens{kl})")
            for turn in window.turns:
                lines.append(f"  > {turn.user}")
                note = ""
                if turn.asked:
                    a = turn.asked
                    kinds = [a.form, f"age {a.age}" if a.told else "untold"]
                    kinds += ["2 hops"] * (a.hops == 2) + ["pronoun"] * a.pronoun
                    kinds += ["corrected"] * a.corrected + [f"WRONG, {a.answer}"] * a.wrong
                    note = f"   [{', '.join(kinds)}]"
                lines.append(f"    {turn.reply}{note}")
        return "\n".join(lines)


class LifeWriter(Told):
    """Writes one life: call `life`, once."""

    def __init__(self, lives: Lives, level: Level, rng: Random):
        super().__init__(lives.library, lives.split, level, rng, lives.values)
        self.encoder, self.chat = lives.encoder, lives.chat
        self.teller, self.asker = Teller(self), Asker(self)
        self.untold = Untold(self, self.teller, self.asker)
        self.carry = Pieces()  # what a boundary inside a turn left for the next window
        self.told_here = 0
        self.favourites: list = []  # keys of the facts that this life comes back to
        self.denied: Fact | None = None  # what the assistant has just got wrong

    def life(self, index: int = 0) -> Life:
        return Life(index, [self.write(i, self.theme(i)) for i in range(self.level.windows)])

    def theme(self, i: int) -> str:
        rng, level = self.rng, self.level
        last = i == level.windows - 1
        if self.chat.any and not self.carry and rng.random() < level.ordinary:
            return "ordinary"
        if i == 0 and not last:
            return rng.choice(("telling", "telling", "mixed"))
        if i and (rng.random() < level.asking):
            return "asking"
        return "last" if last and i else rng.choice(("telling", "mixed", "mixed"))

    def write(self, i: int, theme: str) -> Window:
        """One window, filled up to its capacity."""
        rng, level = self.rng, self.level
        self.window, self.topic, self.last, self.denied, self.asked_here = i, None, (), None, set()
        window = Window(kl=theme == "ordinary")
        if i == 0 and rng.random() < SYSTEM_PROMPT:
            window.pieces.add(self.encoder.opening())
        rest, self.carry = self.carry.cut(level.window_tokens)
        window.pieces.add(rest)
        room = 0.45 if rng.random() < 0.08 else 0.85
        capacity = int(level.window_tokens * rng.uniform(room, 1.0))
        capacity = max(capacity, 64, len(window.pieces))
        self.limit, self.told_here = rng.randint(*level.facts), 0
        failures = 0
        while failures < 6 and not self.carry:
            draft = self.draft(theme)
            if draft is None:
                failures += 1
                continue
            pieces = Pieces()
            for turn in draft.turns:
                pieces.add(self.encoder.turn(turn))
            left = capacity - len(window.pieces)
            if len(pieces) > left:
                failures += 1
                last = i == level.windows - 1
                may_cut = not draft.whole and not last and left >= 8 and not window.kl
                if may_cut and failures == 1 and rng.random() < level.cut:
                    self.happen(draft, window)
                    head, self.carry = pieces.cut(left)
                    window.pieces.add(head)
                continue
            self.happen(draft, window)
            window.pieces.add(pieces)
        if not any(window.pieces.reply):  # nothing fitted: no window is empty
            draft = self.ordinary()
            self.happen(draft, window)
            window.pieces.add(self.encoder.turn(draft.turns[0]))
        return window

    def happen(self, draft: Draft, window: Window) -> None:
        for change in draft.changes:
            change()
        window.turns += draft.turns
        self.topic = draft.topic
        self.last = draft.told if draft.turns[-1].kind == "tell" else ()
        asked = draft.turns[-1].asked
        self.denied = self.world.facts.get(asked.key) if asked and asked.wrong else None
        if self.denied and not self.denied.slot:
            self.denied = None
        told = {e.key[:2] for t in draft.turns if t.kind != "fix" for e in t.events if e.value}
        self.told_here += len(told)

    # --- what is said next ---

    def draft(self, theme: str) -> Draft | None:
        rng = self.rng
        if theme == "ordinary":
            return self.ordinary(made=True, cut=True)
        if self.last and theme != "asking" and rng.random() < FORGET_THAT:
            return self.teller.forget_that()
        if self.denied and rng.random() < INSIST:
            return self.teller.insist(self.denied)
        acts = THEMES[theme]
        act = rng.choices(list(acts), list(acts.values()))[0]
        if act == "tell" and self.told_here >= self.limit:
            act = "ask"
        if act == "ask" and not self.world.facts and theme != "asking":
            act = "tell" if rng.random() < 0.9 and self.told_here < self.limit else "ask"
        if act == "tell":
            return self.teller.tell()
        if act == "chat":
            return self.ordinary(made=rng.random() < MADE)
        if act == "ask":
            return self.question(theme)
        fact = self.asker.fact((0, 0) if rng.random() < 0.3 else None)
        if fact is None:
            return None
        if act == "fix":
            return self.teller.fix(fact)
        return self.teller.forget(fact)

    def question(self, theme: str) -> Draft | None:
        rng = self.rng
        if rng.random() < self.level.untold or not self.world.facts:
            draft = self.untold.ask()
        else:
            for _ in range(4):  # not every fact can be asked for in the words of every split
                draft = self.asker.ask(self.again() if theme == "asking" else self.any_fact())
                if draft:
                    break
            if draft and theme != "asking" and rng.random() < MIXED:
                draft = self.told_and_asked(draft)
        wrong = self.window < self.level.windows - 1 and rng.random() < self.level.wrong
        return self.asker.wrong(draft) if draft and wrong else draft

    def told_and_asked(self, question: Draft) -> Draft:
        """The question in a message that tells something else first."""
        telling = self.teller.tell()
        turn, asked = question.turns[0], question.turns[0].asked
        if telling is None or asked is None or asked.pronoun:
            return question
        told = telling.turns[0]
        if any(event.key[:2] == asked.key[:2] for event in told.events):
            return question
        user = f"{told.user.rstrip('.!?')}. {turn.user}"
        both = replace(turn, user=user, events=told.events)
        changes = [*telling.changes, *question.changes]
        return Draft([both], changes, question.topic, whole=True)

    def any_fact(self) -> Fact:
        """A fact of a life that has some."""
        fact = self.asker.fact()
        assert fact is not None
        return fact

    def again(self) -> Fact:
        """A fact of the few that this life comes back to, or any."""
        rng = self.rng
        if rng.random() >= self.level.re_asked:
            return self.any_fact()
        holds = [k for k in self.favourites if k in self.world.facts]
        for _ in range(200):  # with level.two_hop not every fact may come up
            if len(holds) >= min(5, len(self.world.facts)):
                break
            key = self.any_fact().key
            if key not in holds:
                holds.append(key)
        self.favourites = holds
        return self.world.facts[rng.choice(holds)]

    def ordinary(self, made: bool = False, cut: bool = False) -> Draft:
        """Chat that tells nothing: of the base model's own making if there is any, or small talk.
        cut: replies that were cut off will do; a model held to them would learn to stop early."""
        rng = self.rng
        fitting = self.chat.fitting(3 * self.level.window_tokens, cut) if made else ()
        if fitting:
            exchanges = rng.choice(fitting)
            turns = [Turn(e.user, e.assistant, "chat", CHAT_WEIGHT) for e in exchanges]
        else:
            user, reply = rng.choice(speech.SMALL_TALK)
            user = plain(typed(rng, self.style, user[:1].upper() + user[1:], False))
            turns = [Turn(user, reply, "chat", ACK_WEIGHT)]
        return Draft(turns)


class Ordinary:
    """Ordinary conversations, found by their length."""

    def __init__(self, chat: CHAT):
        made = [[Exchange(*pair) for pair in conversation] for conversation in chat]
        made.sort(key=_length)
        self.any = made
        self.whole = [c for c in made if all(e.complete for e in c)]
        self._lengths = [_length(c) for c in self.any], [_length(c) for c in self.whole]

    def fitting(self, characters: int, cut: bool) -> Sequence[Sequence[Exchange]]:
        """Those of at most so many characters; cut: also those with replies cut off."""
        made, lengths = (self.any if cut else self.whole), self._lengths[0 if cut else 1]
        return made[: bisect_right(lengths, characters)]


def _length(conversation: Sequence[Exchange]) -> int:
    return sum(len(e.user) + len(e.assistant) for e in conversation)


class Lives:
    """Lives of one split.

    chat: ordinary conversations, each a list of Exchanges or (user, assistant) pairs; without any
    there is small talk only, and no window is flagged kl. values: the split of names and values,
    where it is not that of the wordings.
    """

    def __init__(
        self,
        encoder: LifeEncoder,
        split: str,
        seed: int = 0,
        chat: CHAT = (),
        library: Library | None = None,
        values: str = "",
    ):
        self.encoder, self.split, self.seed, self.values = encoder, split, seed, values
        self.chat = Ordinary([c for c in chat if scenes.split_of(c[0][0]) == split])
        self.library = library or default_library()

    def rng(self, *what: object) -> Random:
        text = repr((self.seed, self.split, *what)).encode()
        return Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))

    def writer(self, level: Level, *what: object) -> LifeWriter:
        rng = self.rng(*what, level)
        return LifeWriter(self, level, rng)

    def life(self, index: int, level: Level) -> Life:
        """The life of this index: the same in every process, in any order of calls."""
        return self.writer(level, index).life(index)


def default_library() -> Library:
    """The scenes of language/ and the old kinds."""
    found, pools = scenes.load()
    return Library({**old_kinds(), **found}, pools)


def _words(text: str):
    """A stand-in for a tokenizer: about as many pieces as a real one makes."""
    found = list(re.finditer(r"<\|\w+\|>| ?\w{1,6}|\s|[^\w\s]", text))
    return [0] * len(found), [m.span() for m in found]


def show() -> None:
    """Prints lives, to be read by people."""
    parser = argparse.ArgumentParser(prog="life", description=show.__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0, help="index of the first life")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--split", choices=words.SPLITS, default="train")
    args = parser.parse_args()
    lives = Lives(LifeEncoder(_words, Template.chatml(_words)), args.split)
    for index in range(args.first, args.first + args.count):
        print(f"=== life {index}\n{lives.life(index, Level(windows=args.windows)).text()}\n")


if __name__ == "__main__":
    show()
