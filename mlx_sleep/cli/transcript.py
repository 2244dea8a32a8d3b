"""What was said, in a chat and from outside: /history, /undo, /forget TEXT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from . import output
from .output import count

if TYPE_CHECKING:  # they import MLX
    from ..memory import Message
    from ..session import Session


def said(message: Message) -> str:
    """A message on a line of its own."""
    text = "(not kept)" if message.text is None else " ".join(message.text.split())
    return f"{'> ' if message.role == 'user' else '  '}{text}"


def history(session: Session, last: int | None) -> Iterator[str]:
    messages = session.memory.messages if session.memory else []
    if not messages:
        yield "nothing was said yet"
    shown = messages[-last:] if last else messages
    if len(shown) < len(messages):
        yield f"({count(len(messages) - len(shown), 'message')} before; /history all)"
    yield from map(said, shown)


def undo(session: Session) -> str:
    before = session.memory.messages if session.memory else []
    what = session.undo()
    if what == "sleep":
        return f"undone: the last sleep; {count(session.stats().window_tokens, 'token')} wait again"
    if what == "turn" and session.memory:
        (turn, *_) = before[len(session.memory.messages) :]
        return f"undone: {said(turn).removeprefix('> ')}"
    return "nothing to take back: only the last sleep can be undone, and the turns since"


def forget(session: Session, text: str, confirm: Callable[[str], bool] | None) -> Iterator[str]:
    """Rebuilds the memory without the turns that have this text."""
    from ..rebuild import rebuild, turns, without

    memory = session.memory
    if memory is None or not text:
        yield "nothing was forgotten"
        return
    kept, gone = without(turns(memory.messages, _heard(session), memory.name), text)
    if not gone:
        yield f"nothing was forgotten: {text!r} was never said"
        return
    yield f"{count(len(gone), 'turn')} of {len(kept) + len(gone)} would go, with the replies:"
    yield from (said(turn) for turn, _ in gone)
    if confirm is None or not confirm("forget them?"):
        why = ": nobody can be asked here" if confirm is None else ""
        yield f"nothing was forgotten{why}"
        return
    with output.StatusLine() as status:
        contents = rebuild(
            session.model,
            session.tokenizer,
            memory.header,
            kept,
            memory.settings,
            passes=session.passes,
            window=session.window,
            on_turn=lambda done, all_: status.show(f"reading turn {done} of {all_} again"),
        )
    session.replace(contents)
    yield f"forgotten: the memory was rebuilt from {count(len(kept), 'turn')}"


def _heard(session: Session) -> int:
    stats = session.stats()
    return stats.tokens + stats.window_tokens
