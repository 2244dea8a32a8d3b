"""A memory rebuilt from its transcript: for another model, with more passes, or without a part.

The turns are read one after the other, each with the reply that it got, by a session that has no
memory yet; it sleeps whenever its window is full. Nothing is written here: `Memory.replace` puts
the result in place in one transaction, so what is cancelled or killed on the way has lost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .memory import Contents, Header, Message
from .models.base import flatten_state
from .session import Session, ShouldStop
from .sleep import SleepCancelled
from .utils.errors import UserError

if TYPE_CHECKING:
    from .chat_template import ChatTokenizer
    from .models.base import SleepModel

OnTurn = Callable[[int, int], None]
Turn = tuple[Message, Message | None]


def turns(messages: Iterable[Message], heard: int, name: str) -> list[Turn]:
    """A transcript as pairs of a user's turn and its reply (None: there is none).

    heard: tokens that the memory has heard. UserError when some of them are in no transcript.
    """
    pairs: list[Turn] = []
    for message in messages:
        if message.role == "user":
            pairs.append((message, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], message)
    whole = all(m.text is not None for pair in pairs for m in pair if m)
    if heard and (not pairs or pairs[0][0].position or not whole):
        raise UserError(
            f"memory '{name}' has heard more than its transcript tells, so it can't be rebuilt "
            "without losing that; it was made before transcripts were kept, or --no-transcript was "
            "given"
        )
    return pairs


def without(pairs: list[Turn], text: str) -> tuple[list[Turn], list[Turn]]:
    """The turns in which a text does not occur, in turn or reply, and those in which it does."""

    def has(turn: Turn) -> bool:
        return any(text.casefold() in (m.text or "").casefold() for m in turn if m)

    return [t for t in pairs if not has(t)], [t for t in pairs if has(t)]


def rebuild(
    model: SleepModel,
    tokenizer: ChatTokenizer,
    header: Header,
    pairs: list[Turn],
    settings: dict[str, str],
    *,
    passes: int | None = None,
    window: int | None = None,
    read: Sequence[bool] | None = None,
    sleep: bool = False,
    on_turn: OnTurn | None = None,
    should_stop: ShouldStop | None = None,
) -> Contents:
    """What a memory holds after these turns. header: its provenance, and the model's fingerprint.

    read: which of the turns are read; the others stay in the transcript only. None: all. sleep:
    whether the last window is folded in too. on_turn(done, turns) is called after each turn;
    should_stop() as in `Session.sleep`, and it raises SleepCancelled.
    """
    session = Session(
        model,
        tokenizer,
        None,
        passes=passes,
        window=window,
        system_prompt=settings.get("system_prompt"),
    )
    messages: list[Message] = []
    for done, (turn, reply) in enumerate(pairs, 1):
        start = _heard(session)
        said = reply.text or "" if reply else ""
        if should_stop and should_stop():
            raise SleepCancelled
        if not read or read[done - 1]:
            session.hear(turn.text or "", said, should_stop=should_stop)
        messages.append(replace(turn, position=start))
        if reply:
            position = max(start, _heard(session) - len(session.tokenizer.end_ids))
            messages.append(replace(reply, position=position))
        if on_turn:
            on_turn(done, len(pairs))
    if sleep:
        session.sleep(should_stop=should_stop)
    stats = session.stats()
    header = replace(
        header,
        passes=session.passes if stats.sleeps else 0,
        eviction=model.sleep.eviction if stats.sleeps else "",
        window=session.window if stats.sleeps else 0,
        tokens=stats.tokens,
        sleeps=stats.sleeps,
    )
    arrays = flatten_state(session.snapshot) if stats.sleeps else {}
    return Contents(header, arrays, list(session.pending), tuple(messages), settings)


def _heard(session: Session) -> int:
    stats = session.stats()
    return stats.tokens + stats.window_tokens
