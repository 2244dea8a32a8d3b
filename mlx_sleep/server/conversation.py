"""Which of a client's messages a session has heard already.

Clients of OpenAI's API send a conversation whole each time. A session reads nothing twice, so what
it heard is kept here as turns, each with the one before it in its conversation: a memory may hold
several conversations, and two of them may take turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..memory import Message

Pair = tuple[str, str]
"""What the user said, and the reply."""


@dataclass(frozen=True)
class Turn:
    """before is the place of the turn before it in the same conversation, None for the first;
    kept says that it comes from a transcript, where the turn before it may be another's."""

    user: str
    reply: str
    before: int | None
    kept: bool = False

    def is_(self, pair: Pair) -> bool:
        """Whether a client's pair is this turn. The client of a reply that was cut has less, and a
        conversation's first turn in a transcript begins with its system text."""
        user, reply = pair
        same = self.user == user or self.user.endswith(f"\n\n{user}")
        return same and self.reply.startswith(reply)


def said(messages: Iterable[Message]) -> list[Pair]:
    """A memory's transcript as turns. What was not kept as text is left out."""
    pairs: list[Pair] = []
    for message in messages:
        if message.text is None:
            continue
        if message.role == "user":
            pairs.append((message.text, ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], message.text)
    return pairs


class Conversation:
    """The turns that a session has heard, oldest first."""

    def __init__(self, pairs: Iterable[Pair] = ()):
        self.turns: list[Turn] = []
        self._after: dict[int | None, list[int]] = {}  # place -> places of the turns that follow it
        for user, reply in pairs:  # of an earlier process
            self.add(user, reply, len(self.turns) - 1 if self.turns else None, kept=True)

    def add(self, user: str, reply: str, before: int | None, kept: bool = False) -> int:
        """Returns the turn's place."""
        self._after.setdefault(before, []).append(len(self.turns))
        self.turns.append(Turn(user.strip(), reply.strip(), before, kept))
        return len(self.turns) - 1

    def replaced(self, before: int | None) -> int:
        """How many of the newest turns a new one after `before` takes the place of: a client that
        goes on from there has edited its past. 0 where turns of another conversation came since."""
        if before is None:
            return 0
        later = self.turns[before + 1 :]
        in_line = all(
            turn.before == place and not turn.kept for place, turn in enumerate(later, before)
        )
        return len(later) if in_line else 0

    def take_back(self) -> None:
        """Forgets the newest turn."""
        turn = self.turns.pop()
        self._after[turn.before].remove(len(self.turns))

    def find(self, history: list[Pair]) -> tuple[int | None, int]:
        """Where the longest beginning of `history` was heard: (place of its last turn, length).

        The newest such place, and (None, 0) when even the first turn was never heard.
        """
        best: tuple[int | None, int] = (None, 0)
        for start in reversed(range(len(self.turns))):
            at, places = start, [start]
            for length, pair in enumerate(history):
                said = [place for place in places if self.turns[place].is_(pair)]
                if not said:
                    break
                at, places = said[-1], self._after.get(said[-1], [])
                if length >= best[1]:
                    best = at, length + 1
            if best[1] == len(history):
                break
        return best

    def is_beginning_of(self, history: list[Pair]) -> bool:
        """Whether all that was heard is the beginning of `history`, in its order."""
        return len(self.turns) <= len(history) and all(
            turn.is_(pair) for turn, pair in zip(self.turns, history, strict=False)
        )
