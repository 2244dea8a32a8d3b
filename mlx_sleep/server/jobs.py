"""What a client waits for, as work in small steps: a reply, or a sleep.

A job is made by the HTTP side and done by the engine's thread. `work` is a generator: each step is
a token of a reply or a turn that is read, so that several jobs can take turns. What it has to say
goes to `emit`. Closed early, it leaves its session whole, and what was said on the disk.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx

from ..session import OnPass, Session, ShouldStop
from ..sleep import SleepReport, count_steps
from ..thoughts import Thought
from ..utils.errors import UserError
from .sessions import Sessions, Slot
from .wire import ChatRequest, StopStrings, Usage


@dataclass(frozen=True)
class Taken:
    """The turn is heard, and on the disk if there is a memory."""


@dataclass(frozen=True)
class Piece:
    text: str


@dataclass(frozen=True)
class Done:
    """finish is OpenAI's finish_reason. The reply is on the disk."""

    finish: str
    usage: Usage


@dataclass(frozen=True)
class Slept:
    report: SleepReport | None


@dataclass(frozen=True)
class Failed:
    error: Exception


Event = Taken | Piece | Done | Slept | Failed


class Job:
    """memory is the memory's name, or None. Set `cancelled` when nobody waits any more."""

    def __init__(self, memory: str | None, emit: Callable[[Event], None]):
        self.memory, self.emit = memory, emit
        self.cancelled = threading.Event()

    def work(self, sessions: Sessions) -> Generator[None]:
        raise NotImplementedError


class SleepJob(Job):
    """Sleeps now."""

    def work(self, sessions: Sessions) -> Generator[None]:
        assert self.memory is not None
        sessions.require(self.memory)  # a chat makes memories, a sleep doesn't
        with sessions.memory(self.memory) as slot:
            self.emit(Slept(sleep(slot, self.cancelled.is_set)))
        yield


class ChatJob(Job):
    """A chat completion."""

    def __init__(self, request: ChatRequest, memory: str | None, emit: Callable[[Event], None]):
        super().__init__(memory, emit)
        self.request = request

    def work(self, sessions: Sessions) -> Generator[None]:
        request = self.request
        with (
            sessions.memory(self.memory)
            if self.memory is not None
            else sessions.guest(request.system, request.history)
        ) as slot:
            before, known = slot.conversation.find(request.history)
            for _ in range(slot.conversation.replaced(before)):
                if not _take_back(slot):
                    break
            heard = _heard(slot.session)
            system = _take_system(slot.session, request.system)
            opening = known == 0  # a conversation that this session knows nothing of
            for user, reply in request.history[known:]:
                user_said = _opened(system, user) if opening else user
                slot.session.hear(user_said, reply, *watching(slot, self.cancelled.is_set))
                before, opening = slot.conversation.add(user, reply, before), False
                yield
            said = _opened(system, request.text) if opening else request.text
            _set_up(slot.session, request, sessions.like)
            yield from self._reply(slot, said, heard, before)

    def _reply(self, slot: Slot, said: str, heard: int, before: int | None) -> Generator[None]:
        request, session = self.request, slot.session
        random = _Random(request.seed)
        stop = StopStrings(request.stop)
        text = ""
        pieces = session.say(said, *watching(slot, self.cancelled.is_set))
        prompt = _heard(session)
        try:
            self.emit(Taken())
            with contextlib.closing(pieces):
                while not (stop.hit or self.cancelled.is_set()):
                    with random:
                        piece = next(pieces, None)
                    if isinstance(piece, Thought):
                        yield
                        continue
                    certain = stop.rest() if piece is None else stop.feed(piece)
                    if certain:
                        text += certain
                        self.emit(Piece(certain))
                    if piece is None:
                        break
                    yield
        finally:
            slot.conversation.add(request.text, text, before)
        read = prompt - heard
        completion = max(0, _heard(session) - prompt - len(session.tokenizer.end_ids))
        cut = session.cut and not stop.hit
        attended = max(read, len(session.pending) - (_heard(session) - prompt))
        self.emit(Done("length" if cut else "stop", Usage(attended, completion, attended - read)))


def sleep(slot: Slot, should_stop: ShouldStop) -> SleepReport | None:
    """Sleeps, with its progress in the slot."""
    try:
        return slot.session.sleep(*watching(slot, should_stop))
    finally:
        slot.refresh()


def watching(slot: Slot, should_stop: ShouldStop) -> tuple[OnPass, ShouldStop]:
    """Callbacks for a session that may sleep: its progress goes to the slot."""
    passes = slot.session.passes
    steps = count_steps(slot.session.model, passes)
    done = [0, 0]  # passes, and steps of a sleep

    def on_pass(number: int, of: int, moved: float) -> None:
        done[0] = number

    def step() -> bool:
        if done[1] == steps:  # the next window of a sleep over several
            done[:] = 0, 0
        done[1] += 1
        slot.progress = min(done[0] + 1, passes), passes, done[1] / steps
        return should_stop()

    return on_pass, step


def _heard(session: Session) -> int:
    """Tokens in a session's whole life."""
    stats = session.stats()
    return stats.tokens + stats.window_tokens


def _take_back(slot: Slot) -> bool:
    """Takes back the newest turn, and the sleep since; whether that could be done."""
    while (what := slot.session.undo()) == "sleep":
        pass
    if what is None:
        return False
    slot.conversation.take_back()
    return True


def _take_system(session: Session, system: str) -> str:
    """Makes a client's system text the session's system prompt.

    Returned is what the conversation's first turn must begin with instead: the same text, where the
    chat template has no place for it, or "".
    """
    if not system or system == session.system_prompt:
        return ""
    try:
        session.tokenizer.opening(system)
    except UserError:
        return system
    session.system_prompt = system
    return ""


def _opened(system: str, text: str) -> str:
    """A conversation's first turn."""
    return f"{system}\n\n{text}" if system else text


def _set_up(session: Session, request: ChatRequest, like: Session) -> None:
    """A session's options are those of its last request; the others are those of `like`."""
    session.max_tokens = request.max_tokens or like.max_tokens
    session.sampling = replace(like.sampling, **request.sampling)


class _Random:
    """MLX's random state, one of its own for a reply with a seed. Replies take turns, and MLX has
    one state for the thread."""

    def __init__(self, seed: int | None):
        self._own = seed

    def __enter__(self) -> None:
        if self._own is not None:
            self._others = _random_state()
            mx.random.seed(self._own)

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own = _random_state()
            mx.random.seed(self._others)


def _random_state() -> int:
    """The seed that brings MLX's random state back."""
    high, low = cast(Any, mx.random.state)[0].tolist()
    return high << 32 | low
