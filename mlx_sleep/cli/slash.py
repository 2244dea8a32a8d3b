"""Commands inside a chat: lines such as /sleep and /memory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, get_args

from ..thoughts import Thinking
from . import output, settings, transcript
from .output import count, size
from .sleeping import SYSTEM_WAITS, describe, watch

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session

HELP = """\
/sleep   fold the window into the fast weights now
/memory  what the memory holds
/stats   window, KV cache, fast weights and speed
/history what was said, the last of it; /history all
/undo    take back the last turn, or the last sleep
/set     settings; /set temp 0.7 changes one
/system  the system prompt; /system TEXT sets another, /system "" takes it away
/forget  empty the memory; /forget now doesn't ask; /forget TEXT rebuilds it without that
/help    this list, as /?
/exit    leave, as /quit and /bye; so do Ctrl-D, and Ctrl-C twice"""

COMMANDS = tuple(re.findall("^/[a-z]+", HELP, re.M))
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}
WORDS = {"exit": "/exit", "quit": "/exit"}
"""What somebody types at a terminal to leave; in a pipe it is a turn like any other."""

_TAKES_TEXT = ("/set", "/forget", "/system")


def command(text: str) -> str | None:
    """The command that a line is, or None: "/etc/hosts is a file" is none."""
    first, _, rest = " ".join(text.split()).partition(" ")
    name = ALIASES.get(first.lower(), first.lower())
    if (name, rest.lower()) in (("/forget", "now"), ("/history", "all")):
        return f"{name} {rest.lower()}"
    if rest:
        if name == "/system":  # its lines stay as they are
            rest = text.strip()[len(first) :].strip()
        return f"{name} {rest}" if name in _TAKES_TEXT else None
    return name if re.fullmatch(r"/[a-z?]*", name) else None


def completions(before: str) -> Iterable[str]:
    """Words that go on from a line's text up to its last word."""
    if not before:
        return sorted((*COMMANDS, *ALIASES))
    words: dict[str, Iterable[str]] = {
        "/set ": settings.KINDS,
        "/set thinking ": get_args(Thinking),
        "/forget ": ("now",),
        "/history ": ("all",),
    }
    return words.get(before.lower(), ())


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
        yield from _stats(session)
    elif word == "/set":
        yield from settings.values(session)
    elif word.startswith("/set "):
        yield settings.change(session, word.removeprefix("/set "))
    elif word == "/system":
        yield session.system_prompt or "no system prompt; /system TEXT sets one"
    elif word.startswith("/system "):
        yield _set_system(session, word.removeprefix("/system "))
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
        text = _unquoted(word.removeprefix("/forget "))
        yield from transcript.forget(session, text, confirm)
    elif word in ("/history", "/history all"):
        yield from transcript.history(session, None if word.endswith("all") else 10)
    elif word == "/undo":
        yield transcript.undo(session)
    else:
        near = difflib.get_close_matches(word, (*COMMANDS, *ALIASES), 1)
        meant = f"did you mean {near[0]}? " if near else ""
        yield f"unknown command {word}; {meant}/help lists them"


def _unquoted(text: str) -> str:
    """Without the quotes around all of it."""
    return text[1:-1] if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0] else text


def _set_system(session: Session, text: str) -> str:
    session.system_prompt = _unquoted(text)
    if session.system_prompt_waits:
        return SYSTEM_WAITS
    return "the system prompt is set" if session.system_prompt else "there is no system prompt now"


def _stats(session: Session) -> Iterator[str]:
    stats = session.stats()
    yield f"window        {stats.window_tokens} of {count(stats.window, 'token')}"
    yield f"KV cache      {size(stats.kv_bytes)}"
    yield f"fast weights  {size(stats.fast_weight_bytes)}"
    yield f"sleeps        {stats.sleeps}, of {count(stats.passes, 'pass')} from now on"
    yield f"tokens        {stats.tokens + stats.window_tokens:,} heard and said"
    if stats.prompt_tps:
        speed = f"{stats.prompt_tps:,.1f} tokens/s read"
        if stats.generation_tps:
            speed += f", {stats.generation_tps:,.1f} tokens/s said"
        yield f"last reply    {speed}"


def _sleep_now(session: Session) -> str:
    from ..sleep import NOTHING_TO_SLEEP_INTO, SleepCancelled

    if not session.can_sleep:
        return f"no sleep: {NOTHING_TO_SLEEP_INTO}"
    try:
        report = watch(session, session.sleep)
    except SleepCancelled:
        return "sleep cancelled; nothing is lost"
    return describe(report, session) if report else "nothing to sleep over"


def memory_name(session: Session) -> str:
    """Of a chat, which always has a memory."""
    assert session.memory is not None
    return session.memory.name


def holdings(session: Session) -> str:
    """ "134 tokens in 2 sleeps, 12 more wait for the next" """
    stats = session.stats()
    return output.holdings(stats.tokens, stats.sleeps, stats.window_tokens)
