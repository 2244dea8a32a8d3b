"""Evaluation items made of lives: windows to sleep over, one question, and the value it wants.

Told and asked in the words of one split, so with `test` neither wording, name nor value occurs in
training. Each case asks one thing of a memory; see CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...utils.errors import UserError
from .drafts import Draft
from .life import Level, LifeWriter, Lives
from .life_tokens import Pieces
from .world import Asked, Fact, Turn

DAYS = (1, 4, 8, 16)  # of re_asked: windows of questions, the last of which is asked


@dataclass(frozen=True)
class Example:
    """windows: token ids, a sleep after each. prompt: ids of the question, up to the reply. reply:
    the true answer. value: what it must hold; None where it was never told. age: sleeps since the
    value was told."""

    case: str
    windows: list[list[int]]
    prompt: list[int]
    question: str
    reply: str
    value: str | None
    age: int


# Cases found in lives as they come: case -> (windows, which question of the last one will do).
_FOUND: dict[str, tuple[int, Callable[[Asked], bool]]] = {
    "after_1_sleep": (2, lambda a: a.form == "ask" and a.told and a.age == 1),
    "corrected": (4, lambda a: a.form == "ask" and a.told and a.corrected and a.age > 0),
    "two_hop": (4, lambda a: a.form == "ask" and a.told and a.hops == 2 and a.age > 0),
    "yes_no": (4, lambda a: a.form in ("yes", "no") and a.told and a.age > 0),
    "never_told": (4, lambda a: not a.told),
}
CASES = (
    *(f"re_asked_{day}" for day in DAYS),
    *("after_5_sleeps", "after_16_sleeps", "new_words", "pronoun"),
    *_FOUND,
)


class _Script:
    """Writes windows turn by turn, as a case wants them."""

    def __init__(self, writer: LifeWriter):
        self.writer = writer
        self.windows: list[Pieces] = [Pieces()]
        self.windows[0].add(writer.encoder.opening())

    def place(self, draft: Draft) -> bool:
        """Adds the draft to the window; False, with nothing changed, where it does not fit."""
        pieces = Pieces()
        for turn in draft.turns:
            pieces.add(self.writer.encoder.turn(turn))
        if len(self.windows[-1]) + len(pieces) > self.writer.level.window_tokens:
            return False
        for change in draft.changes:
            change()
        self.windows[-1].add(pieces)
        self.writer.topic, self.writer.last = draft.topic, draft.told
        return True

    def sleep(self) -> None:
        self.windows.append(Pieces())
        self.writer.window += 1
        self.writer.topic, self.writer.last = None, ()

    def askable(self, fact: Fact) -> bool:
        usable = self.writer.library.usable(fact.scene, self.writer.split)
        asks = [q for q in usable.questions.get(fact.slot, ()) if q.kind == "ask"]
        return bool(fact.slot) and any(not q.wording.slots for q in asks)

    def tell(self, kind: str | None = None, pronoun: bool = False) -> list[Fact]:
        """Tells one clause that can be asked for, in this window or the next; its facts.
        pronoun: of the being of the turn before, by "he" or "she"."""
        writer = self.writer
        for _ in range(200):
            topic = writer.topic if pronoun else None
            entity = topic[0] if topic else None
            found = writer.teller.pick(entity, kind)
            if found is None or (pronoun and not found[2].mentions("s")):
                continue
            clause = writer.teller.told_clause(*found, pronoun=pronoun)
            facts = [f for f in clause.facts if self.askable(f)]
            if not facts:
                continue
            draft = writer.teller.say([clause])
            if not self.place(draft):
                if pronoun:
                    return []
                self.sleep()
                if not self.place(draft):
                    self.windows.pop()
                    self.writer.window -= 1
                    continue
            return facts
        return []

    def ask(self, fact: Fact) -> Turn | None:
        """A plain question for a fact; None where the split has none."""
        for _ in range(60):
            draft = self.writer.asker.ask(fact, pronoun=False)
            if draft and (asked := draft.turns[0].asked) and asked.form == "ask":
                return draft.turns[0]
        return None

    def small_talk(self) -> None:
        self.place(self.writer.ordinary())


def _re_asked(script: _Script, day: int) -> Turn | None:
    """6 facts told on day 0, then a window of questions on all of them on each day; of the last
    day's, one."""
    rng = script.writer.rng
    facts: list[Fact] = []
    while len(facts) < 6:
        told = script.tell()
        if not told:
            return None
        facts.append(rng.choice(told))
    for _ in range(day - 1):
        script.sleep()
        for fact in rng.sample(facts, len(facts)):
            turn = script.ask(fact)
            if turn:
                script.place(Draft([turn]))
    script.sleep()
    return script.ask(rng.choice(facts))


def _after_5(script: _Script, _: int) -> Turn | None:
    """20 facts over 5 windows; 6 where they need more words."""
    facts: list[Fact] = []
    for i in range(20):
        facts += script.tell()[:1]
        if i % 4 == 3 and len(script.windows) <= i // 4 + 1:
            script.sleep()
    return script.ask(script.writer.rng.choice(facts)) if len(script.windows) <= 7 else None


def _after_16(script: _Script, _: int) -> Turn | None:
    """20 facts over 16 windows with small talk."""
    rng = script.writer.rng
    facts: list[Fact] = []
    for i in range(16):
        for _ in range(1 + (i < 4)):
            facts += script.tell()[:1]
            if rng.random() < 0.5:
                script.small_talk()
        if len(script.windows) <= i + 1:
            script.sleep()
    return script.ask(rng.choice(facts)) if facts else None


def _new_words(script: _Script, _: int) -> Turn | None:
    """2 to 5 made-up words over 1 to 3 windows."""
    rng = script.writer.rng
    facts: list[Fact] = []
    for _ in range(rng.randint(1, 3)):
        facts += script.tell("word")[:1]
        if rng.random() < 0.6:
            facts += script.tell("word")[:1]
        script.small_talk()
        script.sleep()
    return script.ask(rng.choice(facts)) if facts else None


def _pronoun(script: _Script, _: int) -> Turn | None:
    """A being told of, then another fact of it told by a pronoun in the next turn."""
    writer = script.writer
    script.tell()
    if not script.tell("person") or not writer.topic:
        return None
    facts = script.tell(pronoun=True)
    if not facts:
        return None
    script.tell()
    script.sleep()
    return script.ask(facts[0])


_SCRIPTS = {
    "after_5_sleeps": _after_5,
    "after_16_sleeps": _after_16,
    "new_words": _new_words,
    "pronoun": _pronoun,
}


def examples(lives: Lives, case: str, n: int = 500, window_tokens: int = 192) -> Iterator[Example]:
    """`n` items of `case`, the same in every process; the i-th does not depend on n.

    ValueError for an unknown case; UserError where the split's wordings or the window do not
    suffice.
    """
    if case not in CASES:
        raise ValueError(f"case must be one of {', '.join(CASES)}, not {case!r}")
    for index in range(n):
        for attempt in range(200):
            example = _attempt(lives, case, index, attempt, window_tokens)
            if example is not None:
                yield example
                break
        else:
            raise UserError(
                f"the case {case} cannot be made with windows of {window_tokens} tokens; "
                f"use longer windows, or other cases"
            )


def _attempt(lives: Lives, case: str, index: int, attempt: int, size: int) -> Example | None:
    day = int(case.rsplit("_", 1)[1]) if case.startswith("re_asked") else 0
    if case in _FOUND:
        windows, fits = _FOUND[case]
        level = Level(windows, size, wrong=0.0, ordinary=0.0, cut=0.0)
        life = lives.writer(level, case, index, attempt).life()
        turns = [t for t in life.windows[-1].turns if t.asked and not t.asked.pronoun]
        turn = next((t for t in turns if t.asked and fits(t.asked)), None)
        before = [window.pieces for window in life.windows[:-1]]
    else:
        level = Level(1, size, untold=0.0, quick_fix=0.0)
        script = _Script(lives.writer(level, case, index, attempt))
        turn = _SCRIPTS.get(case, _re_asked)(script, day)
        before = script.windows[:-1]
    if turn is None or turn.asked is None:
        return None
    asked = turn.asked
    return Example(
        case,
        [pieces.ids for pieces in before],
        lives.encoder.prompt(turn.user),
        turn.user,
        asked.answer,
        asked.value if asked.told else None,
        asked.age,
    )
