"""Deep sleep: what a memory was told is read again, when the model is found to have forgotten it.

Each sleep folds the newest window into the fast weights and fades what lies there: a fact that is
asked about for days is buried by the answers. So in a long idle time the model is asked again what
it once answered out of its memory. When it has come to doubt that, a memory is rebuilt from the
turns of the transcript that told something, and takes the old one's place if it recalls better.

The transcript knows no right answers. A *probe* is a turn whose reply has a word that the user said
in an earlier turn, and not in this one: it was answered out of the memory, right or wrong. Its loss
is the negative log-probability of that reply given the fast weights and the question alone, in
nats. The same with the telling turn in the window before the question is what it is when fresh.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

from .memory import Contents
from .models.base import State, unflatten_state
from .rebuild import Turn, rebuild, turns
from .session import Session, ShouldStop
from .sleep import SleepCancelled
from .utils.errors import UserError

PROBES = 12
"""How many are asked: the last ones."""

FADED = 1.0
"""Nats a reply: it has become e times less likely than with its telling in the window."""

_LETTERS = 3  # of a word that tells something; shorter ones are grammar


class Probe(NamedTuple):
    """A question, its reply, and the turn (text and reply) that told what the reply says."""

    question: str
    reply: str
    told: tuple[str, str]


class DeepSleepReport(NamedTuple):
    """Mean losses of the probes in nats a reply: before, with the tellings in the window, after.

    read counts the turns that were read again; 0 when nothing had faded. kept says whether the
    memory was replaced.
    """

    before: float
    fresh: float
    after: float
    probes: int
    read: int
    kept: bool


def probes(pairs: list[Turn]) -> list[tuple[int, Probe]]:
    """Each probe of a transcript with the number of its turn."""
    found = []
    told: dict[str, int] = {}  # word -> the last turn in which the user said it
    for number, (turn, reply) in enumerate(pairs):
        said, answer = turn.text or "", (reply and reply.text) or ""
        tellers = [told[word] for word in _words(answer) - _words(said) if word in told]
        if tellers:
            teller, its_reply = pairs[max(tellers)]
            pair = (teller.text or "", (its_reply and its_reply.text) or "")
            found.append((number, Probe(said, answer, pair)))
        told.update(dict.fromkeys(_words(said), number))
    return found


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) >= _LETTERS}


def deep_sleep(session: Session, should_stop: ShouldStop | None = None) -> DeepSleepReport | None:
    """Asks the probes, and rebuilds the memory if they have faded. None when none can be asked:
    there is no transcript, or nothing was answered out of it yet.

    A transaction, as a sleep is: SleepCancelled leaves everything as it was. The window must be
    empty.
    """
    memory = session.memory
    if memory is None or not session.can_sleep or session.pending:
        return None
    try:
        pairs = turns(memory.messages, memory.header.tokens, memory.name)
    except UserError:
        return None
    numbered = probes(pairs)
    asked = [probe for _, probe in numbered[-PROBES:]]
    if not asked:
        return None
    before = _loss(session, session.snapshot, asked, False, should_stop)
    fresh = _loss(session, session.snapshot, asked, True, should_stop)
    if before - fresh < FADED:
        return DeepSleepReport(before, fresh, before, len(asked), 0, False)
    answers = {number for number, _ in numbered}
    telling = [i not in answers for i in range(len(pairs))]
    contents = rebuild(
        session.model,
        session.tokenizer,
        memory.header,
        pairs,
        memory.settings,
        passes=session.passes,
        window=session.window,
        read=telling,
        should_stop=should_stop,
        sleep=True,
    )
    after = _loss(session, _state(session, contents), asked, False, should_stop)
    if better := after < before:
        session.replace(contents)
    return DeepSleepReport(before, fresh, after, len(asked), sum(telling), better)


def _state(session: Session, contents: Contents) -> State:
    empty = session.model.init_state()
    return unflatten_state(contents.arrays, len(empty)) if contents.arrays else empty


def _loss(
    session: Session,
    state: State,
    asked: list[Probe],
    told: bool,
    should_stop: Callable[[], bool] | None,
) -> float:
    """The mean loss of the replies from a state with an empty window; told: see `fresh`."""
    tokenizer, total = session.tokenizer, 0.0
    for probe in asked:
        if should_stop and should_stop():
            raise SleepCancelled
        ids: list[int] = []
        if told:
            text, reply = probe.told
            ids += tokenizer.turn(text, first=False)
            ids += tokenizer.encode_text(reply) + tokenizer.end_ids
        ids += tokenizer.turn(probe.question, first=False)
        reply_ids = tokenizer.encode_text(probe.reply)
        start = len(ids) - 1
        h, _ = session.model.hidden(mx.array([ids + reply_ids[:-1]]), state)
        logits = session.model.head(h[:, start:])[0].astype(mx.float32)
        likely = mx.take_along_axis(logits, mx.array(reply_ids)[:, None], axis=1)[:, 0]
        total += cast(float, (mx.logsumexp(logits, axis=1) - likely).sum().item())
    return total / len(asked)
