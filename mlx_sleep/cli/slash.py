"""Commands inside a chat: lines such as /sleep and /memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from . import output
from .output import count, size
from .sleeping import describe, watch

if TYPE_CHECKING:  # it imports MLX
    from ..memory import Message
    from ..session import Session

HELP = """\
/sleep   fold the window into the fast weights now
/memory  what the memory holds
/stats   window, KV cache and fast weights
/history what was said, the last of it; /history all
/undo    take back the last turn, or the last sleep
/forget  empty the memory; /forget now doesn't ask; /forget TEXT makes it anew without that
/help    this list
/exit    leave; so do Ctrl-D, and Ctrl-C twice"""


def command(text: str) -> str | None:
    """The command that a line is, or None: "/etc/hosts is a file" is none."""
    words = " ".join(text.split())
    return words if re.fullmatch(r"/[A-Za-z]*|/history all|/forget .*", words) else None


def answer(session: Session, word: str, confirm: Callable[[str], bool] | None) -> Iterator[str]:
    """Runs a command; the lines to show.

    confirm asks the user a question; None where nobody can answer.
    """
    if word == "/help":
        yield HELP
    elif word == "/sleep":
        yield _sleep_now(session)
    elif word == "/memory":
        yield f"memory '{memory_name(session)}': {holdings(session)}"
    elif word == "/stats":
        stats = session.stats()
        yield f"window        {stats.window_tokens} of {count(stats.window, 'token')}"
        yield f"KV cache      {size(stats.kv_bytes)}"
        yield f"fast weights  {size(stats.fast_weight_bytes)}"
        yield f"sleeps        {stats.sleeps}, of {count(stats.passes, 'pass')} from now on"
        yield f"tokens        {stats.tokens + stats.window_tokens:,} heard and said"
    elif word == "/forget" and confirm is None:
        yield "nothing was forgotten: nobody can be asked here; /forget now doesn't ask"
    elif word in ("/forget", "/forget now"):
        if word == "/forget now" or (
            confirm and confirm(f"forget all of memory '{memory_name(session)}'?")
        ):
            session.forget()
            yield "forgotten: the memory is empty"
        else:
            yield "nothing was forgotten"
    elif word.startswith("/forget "):
        yield from _forget_text(session, word.removeprefix("/forget ").strip("\"'"), confirm)
    elif word in ("/history", "/history all"):
        yield from _history(session, None if word.endswith("all") else 10)
    elif word == "/undo":
        yield _undo(session)
    else:
        yield f"unknown command {word}; /help lists them"


def _sleep_now(session: Session) -> str:
    from ..sleep import NOTHING_TO_SLEEP_INTO, SleepCancelled

    if not session.can_sleep:
        return f"no sleep: {NOTHING_TO_SLEEP_INTO}"
    try:
        report = watch(session, session.sleep)
    except SleepCancelled:
        return "sleep cancelled; nothing is lost"
    return describe(report, session) if report else "nothing to sleep over"


def said(message: Message) -> str:
    """A message on a line of its own."""
    text = "(not kept)" if message.text is None else " ".join(message.text.split())
    return f"{'> ' if message.role == 'user' else '  '}{text}"


def _history(session: Session, last: int | None) -> Iterator[str]:
    messages = session.memory.messages if session.memory else []
    if not messages:
        yield "nothing was said yet"
    shown = messages[-last:] if last else messages
    if len(shown) < len(messages):
        yield f"({count(len(messages) - len(shown), 'message')} before; /history all)"
    yield from map(said, shown)


def _undo(session: Session) -> str:
    before = session.memory.messages if session.memory else []
    what = session.undo()
    if what == "sleep":
        return f"undone: the last sleep; {count(session.stats().window_tokens, 'token')} wait again"
    if what == "turn" and session.memory:
        (turn, *_) = before[len(session.memory.messages) :]
        return f"undone: {said(turn)}"
    return "nothing to take back: only the last sleep can be undone, and the turns since"


def _forget_text(
    session: Session, text: str, confirm: Callable[[str], bool] | None
) -> Iterator[str]:
    """Makes the memory anew without the turns that have this text."""
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
    yield f"forgotten: the memory was made anew from {count(len(kept), 'turn')}"


def _heard(session: Session) -> int:
    stats = session.stats()
    return stats.tokens + stats.window_tokens


def memory_name(session: Session) -> str:
    """Of a chat, which always has a memory."""
    assert session.memory is not None
    return session.memory.name


def holdings(session: Session) -> str:
    """ "134 tokens in 2 sleeps, 12 more wait for the next" """
    stats = session.stats()
    waiting = stats.window_tokens
    if not stats.sleeps:
        return f"{count(waiting, 'token')} wait for the first sleep" if waiting else "empty"
    slept = f"{count(stats.tokens, 'token')} in {count(stats.sleeps, 'sleep')}"
    return f"{slept}, {waiting} more wait for the next" if waiting else slept
